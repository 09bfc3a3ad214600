"""The critic of convolutional tokenizers against PyTorch, built from its description.

Latent diffusion: convolutions of 4 x 4 with padding 1; the first and the next two halve
the sides, all but the first and the last are followed by a batch norm and have no bias,
leaky ReLU of slope 0.2 between them.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.models import patchgan

pytestmark = pytest.mark.parity
WIDTHS = (3, 8, 16, 32, 64, 1)
STRIDES = (2, 2, 2, 1, 1)


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


def reference(torch):
    layers, inner = [], range(1, len(STRIDES) - 1)
    for i, stride in enumerate(STRIDES):
        sizes = WIDTHS[i], WIDTHS[i + 1]
        layers.append(torch.nn.Conv2d(*sizes, 4, stride, 1, bias=i not in inner))
        if i in inner:
            layers.append(torch.nn.BatchNorm2d(sizes[1]))
        if i < len(STRIDES) - 1:
            layers.append(torch.nn.LeakyReLU(0.2))
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, 0.0, 0.2)
        elif isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.weight, 1.0, 0.2)
            torch.nn.init.normal_(layer.bias, 0.0, 0.2)
    return torch.nn.Sequential(*layers).train()


def copied(torch, theirs):
    """Our critic with the parameters of the reference."""
    ours = patchgan.PatchGAN(WIDTHS[1], 3, rngs=nnx.Rngs(0))
    convs = [m for m in theirs if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in theirs if isinstance(m, torch.nn.BatchNorm2d)]
    numpy = lambda x: jnp.asarray(x.detach().numpy())  # noqa: E731
    places = (ours.conv_in, *ours.convs, ours.conv_out)
    for conv, place in zip(convs, places, strict=True):
        place.kernel[...] = numpy(conv.weight.permute(2, 3, 1, 0))
        if conv.bias is not None:
            place.bias[...] = numpy(conv.bias)
    for norm, place in zip(norms, ours.norms, strict=True):
        place.scale[...], place.bias[...] = numpy(norm.weight), numpy(norm.bias)
    return ours


def test_forward_and_gradient(torch):
    """Of a batch in training mode: float32, 1e-5 of the largest."""
    theirs = reference(torch)
    ours = copied(torch, theirs)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64, 3))
    images = images.astype(np.float32)
    x = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    expected = theirs(x)
    expected.sin().sum().backward()
    found = ours(jnp.asarray(images))
    want = expected[:, 0].detach().numpy()
    assert found.shape == want.shape == (3, 6, 6)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    grads = jax.grad(lambda x: jnp.sum(jnp.sin(ours(x))))(jnp.asarray(images))
    want = x.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(grads, want, atol=1e-4 * np.abs(want).max())


def test_initial_values_and_parameter_count(torch):
    """Kernels N(0, 0.02), scales N(1, 0.02); as many parameters as the reference."""
    theirs = reference(torch)
    ours = patchgan.PatchGAN(WIDTHS[1], 3, rngs=nnx.Rngs(0))
    params = jax.tree.leaves(nnx.to_pure_dict(nnx.state(ours, nnx.Param)))
    assert sum(p.size for p in params) == sum(p.numel() for p in theirs.parameters())
    kernel, scale = ours.convs[2].kernel[...], ours.norms[2].scale[...]
    assert abs(float(kernel.std()) - 0.02) < 1e-3
    assert abs(float(scale.mean()) - 1) < 0.01 and 0.01 < float(scale.std()) < 0.03
