"""The critic's layers against PyTorch's own, on shapes that the goldens lack."""

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.losses import adversarial
from rae_jax.models import discriminator, inception

pytestmark = pytest.mark.parity
torch = None  # Bound by the fixture: only parity runs have torch.


@pytest.fixture(autouse=True, scope="module")
def import_torch():
    global torch
    torch = importlib.import_module("torch")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(actual, desired, rtol=1e-5):
    desired = desired.detach().numpy()
    atol = rtol * np.abs(desired).max()
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_group_norm(groups):
    """Tokens (b, n, d) here are (b, d, n) there."""
    norm = discriminator.GroupNorm(12, groups, rngs=nnx.Rngs(0))
    scale, bias = normal(12, seed=1), normal(12, seed=2)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    x = 3 * normal(2, 7, 12) + 1
    expected = torch.nn.functional.group_norm(
        torch.from_numpy(x.swapaxes(1, 2).copy()),
        groups,
        torch.from_numpy(scale),
        torch.from_numpy(bias),
        eps=1e-6,
    )
    close(norm(jnp.asarray(x)), expected.transpose(1, 2))


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_circular_convolution(kernel_size):
    conv = discriminator.Conv(5, 6, kernel_size, spectral_norm=False, rngs=nnx.Rngs(0))
    reference = torch.nn.Conv1d(
        5, 6, kernel_size, padding=kernel_size // 2, padding_mode="circular"
    )
    kernel = np.array(conv.kernel[...].transpose(2, 1, 0))
    with torch.no_grad():
        reference.weight.copy_(torch.from_numpy(kernel))
        reference.bias.copy_(torch.from_numpy(np.array(conv.bias[...])))
    x = normal(2, 9, 5)
    expected = reference(torch.from_numpy(x.swapaxes(1, 2).copy()))
    close(conv(jnp.asarray(x)), expected.transpose(1, 2))


def reference_of(conv, kernel_size):
    """Returns a torch convolution with the weights and vectors of one of ours."""
    features = conv.kernel[...].shape[1:]
    options = dict(padding=kernel_size // 2, padding_mode="circular")
    reference = torch.nn.Conv1d(*features, kernel_size, **options)
    with warnings.catch_warnings():  # Its successor has other names and defaults.
        warnings.simplefilter("ignore")
        reference = torch.nn.utils.spectral_norm(reference)
    kernel = np.array(conv.kernel[...].transpose(2, 1, 0))
    with torch.no_grad():
        reference.weight_orig.copy_(torch.from_numpy(kernel))
        reference.bias.copy_(torch.from_numpy(np.array(conv.bias[...])))
        reference.weight_u.copy_(torch.from_numpy(np.array(conv.u[...])))
        reference.weight_v.copy_(torch.from_numpy(np.array(conv.v[...])))
    return reference


@pytest.mark.parametrize("kernel_size, out_features", [(1, 6), (9, 6), (1, 1)])
def test_spectral_norm(kernel_size, out_features):
    """Two training passes, an iteration before each: outputs, gradients, vectors."""
    conv = discriminator.Conv(5, out_features, kernel_size, rngs=nnx.Rngs(0))
    reference = reference_of(conv, kernel_size)
    graphdef, *states = nnx.split(conv, nnx.Param, discriminator.SpectralVector)
    params, vectors = map(nnx.to_pure_dict, states)
    for seed in (1, 2):
        x, weights = normal(2, 11, 5), normal(2, 11, out_features, seed=seed)
        vectors = discriminator.power_iteration(params, vectors)

        def scalar(params, vectors=vectors, x=x, weights=weights):
            return jnp.sum(nnx.merge(graphdef, params, vectors)(x) * weights)

        value, grads = jax.value_and_grad(scalar)(params)
        out = reference(torch.from_numpy(x.swapaxes(1, 2).copy())).transpose(1, 2)
        expected = torch.sum(out * torch.from_numpy(weights))
        reference.zero_grad()
        expected.backward()
        close(value, expected)
        close(grads["kernel"], reference.weight_orig.grad.permute(2, 1, 0))
        close(vectors["u"], reference.weight_u)
        close(vectors["v"], reference.weight_v)


def test_initial_values_have_torch_statistics():
    """Uniform, with the bounds of a new torch.nn.Conv1d."""
    conv = discriminator.Conv(64, 64, 9, rngs=nnx.Rngs(0))
    reference = torch.nn.Conv1d(64, 64, 9)
    for ours, theirs in ((conv.kernel, reference.weight), (conv.bias, reference.bias)):
        bound = float(theirs.detach().abs().max())
        assert float(jnp.abs(ours[...]).max()) == pytest.approx(bound, rel=0.05)
    assert float(jnp.std(conv.kernel[...])) == pytest.approx(
        float(reference.weight.detach().std()), rel=0.02
    )
    assert float(jnp.linalg.norm(conv.u[...])) == pytest.approx(1, rel=1e-6)


def test_pools_of_inception():
    x = normal(2, 8, 11, 3)
    moved = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    pool = torch.nn.functional
    options = dict(kernel_size=3, stride=1, padding=1)
    expected = {
        inception._average: pool.avg_pool2d(moved, **options, count_include_pad=False),
        inception._maximum: pool.max_pool2d(moved, **options),
        inception._reduce: pool.max_pool2d(moved, kernel_size=3, stride=2),
    }
    for function, value in expected.items():
        close(function(jnp.asarray(x)), value.permute(0, 2, 3, 1))


def test_quantise_rounds_like_torch():
    """Halves between two levels go to the even one in both."""
    x = np.linspace(-1.1, 1.1, 4001, dtype=np.float32)
    halves = (np.arange(0, 255, dtype=np.float32) + 0.5) / 127.5 - 1
    for values in (x, halves):
        clamped = torch.from_numpy(values).clamp(-1, 1)
        expected = ((clamped + 1) * 127.5).round() / 127.5 - 1
        found = adversarial.quantise(jnp.asarray(values))
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)
