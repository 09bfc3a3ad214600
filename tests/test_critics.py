"""The critic, Inception and LPIPS with official weights, in and out."""

import functools
import json

import golden_map
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeded
from flax import nnx

from rae_jax.convert import critic_names, encoder_names, sources, tables
from rae_jax.losses import adversarial
from rae_jax.models import discriminator, inception, perceptual, vit_encoder

CASES = ("bn_sn_ks9", "gn_nosn_ks3")


def close(actual, desired, atol):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def close_to_largest(actual, desired, rtol):
    close(actual, desired, rtol * np.abs(desired).max())


@jax.jit
def run(model, *inputs):
    return model(*inputs)


def shapes_of(make):
    """Returns the graph, the paths and the shapes of everything a module holds."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    names = {".".join(map(str, path)): path for path in flat}
    return graphdef, state, {name: flat[path].shape for name, path in names.items()}


def load(make, table, official):
    """Returns a module with official weights, after a trip there and back."""
    graphdef, state, shapes = shapes_of(make)
    source = sources.from_arrays(official)
    tables.check(table, source, shapes)
    ours = dict(tables.to_ours(table, source, shapes))
    kept = dict(tables.extras_of(table, source))
    back = dict(tables.to_foreign(table, sources.from_arrays(ours | kept), shapes))
    assert set(back) == set(official)
    for name, value in official.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name, strict=True)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(ours[".".join(map(str, path))]))
    return nnx.merge(graphdef, state)


# The critic.


@functools.cache
def golden(case):
    return golden_map.under(golden_map.read("discriminator"), f"{case}/")


@functools.cache
def load_critic(case):
    config = golden_map.config(golden(case), "config")
    make = functools.partial(
        discriminator.Discriminator,
        config["recipe"]["embed_dim"],
        3,
        kernel_size=config["ks"],
        norm_groups=32 if config["norm_type"] == "gn" else None,
        spectral_norm=config["using_spec_norm"],
    )
    table = critic_names.discriminator_table(3, spectral_norm=config["using_spec_norm"])
    return load(make, table, golden_map.under(golden(case), "params/"))


def first_features():
    """Features of the first golden image, the last block's twice."""
    arrays = golden_map.read("discriminator")
    first, last = (arrays[f"features/{i}"].swapaxes(1, 2) for i in (1, 2))
    return [jnp.asarray(x) for x in (last, first, last)]


@pytest.mark.parametrize("case", CASES)
def test_logits_of_features(case):
    logits = run(load_critic(case), first_features())
    close(logits, golden(case)["eval_logits"][:1], 2e-5)


@functools.cache
def load_backbone():
    arrays = golden_map.read("discriminator")
    sizes = dict(
        image_size=224,
        patch_size=8,
        hidden_size=32,
        depth=4,
        num_heads=2,
        intermediate_size=128,
    )
    make = functools.partial(
        vit_encoder.ViTEncoder, "dino", **sizes, activation="gelu_tanh"
    )
    table = encoder_names.table("dino", **sizes)
    return load(make, table, golden_map.under(arrays, "backbone/"))


def images_of(name):
    return golden_map.last(golden_map.read("discriminator")[name])


@jax.jit
def run_backbone(backbone, images):
    return discriminator.critic_features(backbone, images, blocks=(1, 3))


@functools.cache
def features(name):
    return run_backbone(load_backbone(), images_of(name))


def test_features():
    for found, expected in zip(features("x"), first_features(), strict=True):
        close(found[:1], expected, 3e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "name, key, atol", [("x", "eval_logits", 2e-5), ("x72", "eval_logits_x72", 2e-4)]
)
def test_logits_of_images(case, name, key, atol):
    """PyTorch rounds positions in images of 72 pixels, which costs the logits 2e-5."""
    close(run(load_critic(case), features(name)), golden(case)[key], atol)


@pytest.mark.parametrize("case", CASES)
def test_generator_gradient(case):
    critic, backbone = load_critic(case), load_backbone()

    @jax.jit
    @jax.value_and_grad
    def loss(images):
        return adversarial.generator_loss(critic(run_backbone(backbone, images)))

    value, grad = loss(images_of("x"))
    np.testing.assert_allclose(value, golden(case)["g_loss"], rtol=1e-5)
    expected = golden_map.last(golden(case)["d_g_loss_d_x"])
    close_to_largest(grad, expected, 1e-4)


def pure(state):
    return nnx.to_pure_dict(state)


def assert_gradients(case, grads):
    """Compares with the golden gradients, under their official names."""
    config = golden_map.config(golden(case), "config")
    table = critic_names.discriminator_table(3, spectral_norm=config["using_spec_norm"])
    entries = {entry.name: entry for entry in table.entries}
    for name, expected in golden_map.under(golden(case), "train/grads/").items():
        found = grads
        for part in entries[name].path.split("."):
            found = found[int(part) if part.isdigit() else part]
        found = tables.FORMS[entries[name].form].to_foreign(np.asarray(found), None)
        close_to_largest(found, expected, 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_discriminator_step(case):
    """Two forward passes, fakes first, each after one power iteration.

    The norms undo the scale of the kernels before them, so this says nothing about
    iterations but for the last convolution; the parity tests compare those.
    """
    graphdef, params, vectors = nnx.split(
        load_critic(case), nnx.Param, discriminator.SpectralVector
    )
    params, vectors = pure(params), pure(vectors)
    first = discriminator.power_iteration(params, vectors)
    second = discriminator.power_iteration(params, first)
    features_fake, features_real = features("x2"), features("x")

    @jax.jit
    def loss(params):
        fake = nnx.merge(graphdef, params, first)(features_fake)
        real = nnx.merge(graphdef, params, second)(features_real)
        return adversarial.discriminator_loss(real, fake)[0], (fake, real)

    (value, (fake, real)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    expected = golden_map.under(golden(case), "train/")
    close(fake, expected["logits_fake"], 2e-5)
    close(real, expected["logits_real"], 2e-5)
    np.testing.assert_allclose(value, expected["d_loss"], rtol=1e-5)
    close(jnp.mean(real > fake), expected["accuracy"], 5e-4)
    assert_gradients(case, grads)


def test_power_iteration_finds_the_spectral_norm():
    """A normalised kernel has a largest singular value of one."""
    conv = discriminator.Conv(6, 5, 3, rngs=nnx.Rngs(0))
    graphdef, params, vectors = nnx.split(conv, nnx.Param, discriminator.SpectralVector)
    params, vectors = pure(params), pure(vectors)
    vectors = jax.lax.fori_loop(
        0, 100, lambda _, v: discriminator.power_iteration(params, v), vectors
    )
    kernel = np.asarray(params["kernel"])
    largest = np.linalg.norm(kernel.reshape(-1, 5), ord=2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 6)), jnp.float32)
    plain = discriminator.Conv(6, 5, 3, spectral_norm=False, rngs=nnx.Rngs(0))
    plain.kernel[...] = jnp.asarray(kernel / largest)
    plain.bias[...] = params["bias"]
    close(nnx.merge(graphdef, params, vectors)(x), plain(x), 1e-5)


def test_default_critic_has_the_official_size():
    make = discriminator.Discriminator
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(x.size for x in jax.tree.leaves(state)) == 7_386_245


def test_convolution_is_circular():
    """Moving the tokens around the circle moves the outputs with them."""
    conv = discriminator.Conv(3, 4, 5, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 3)), jnp.float32)
    close(conv(jnp.roll(x, 3, axis=1)), jnp.roll(conv(x), 3, axis=1), 1e-6)


def test_critic_refuses_wrong_sizes():
    with pytest.raises(ValueError, match="odd, not 4"):
        discriminator.Discriminator(8, 1, kernel_size=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="3 groups do not divide 8"):
        discriminator.Discriminator(8, 1, norm_groups=3, rngs=nnx.Rngs(0))


def test_bfloat16_critic_is_close_and_returns_float32():
    critic = discriminator.Discriminator(32, 3, dtype="bfloat16", rngs=nnx.Rngs(0))
    exact = discriminator.Discriminator(32, 3, rngs=nnx.Rngs(0))
    logits, expected = (run(model, first_features()) for model in (critic, exact))
    assert logits.dtype == jnp.float32
    close_to_largest(logits, np.asarray(expected), 0.05)


# Inception.


@functools.cache
def load_inception():
    shapes = json.loads(str(golden_map.read("inception")["shapes"]))
    official = {name: seeded.weight(name, tuple(s)) for name, s in shapes.items()}
    return load(inception.InceptionV3, critic_names.inception_table(), official)


@jax.jit
def run_inception(model, images):
    found = model(images)
    biased = model.logits(found.pool, use_bias=True)
    return found.pool, found.spatial, model.logits(found.pool), biased


@pytest.mark.parametrize("height, width", [(40, 64), (333, 301)])
def test_inception(height, width):
    """Outputs of torch-fidelity with the same seeded weights, computed in float64.

    Float32 alone costs it 8e-7 of the largest value.
    """
    arrays = golden_map.under(golden_map.read("inception"), f"{height}x{width}/")
    outputs = run_inception(load_inception(), seeded.image(height, width))
    for name, found in zip(
        ("pool", "spatial", "logits_unbiased", "logits"), outputs, strict=True
    ):
        close_to_largest(found, arrays[name], 1e-5)


@pytest.mark.parametrize("height, width", [(40, 64), (333, 301)])
def test_resizing_like_tensorflow1(height, width):
    arrays = golden_map.under(golden_map.read("inception"), f"{height}x{width}/")
    images = jnp.asarray(seeded.image(height, width), jnp.float32)
    found = inception.resize_like_tensorflow1(images, 299, 299)[0]
    close(found[200], arrays["resized_row"], 3e-5)  # Of 255.
    close(found[:, 200], arrays["resized_column"], 3e-5)


def test_inception_refuses_images_that_are_not_uint8():
    model = nnx.eval_shape(lambda: inception.InceptionV3(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="uint8.*float32"):
        model(jnp.zeros((1, 32, 32, 3)))


# LPIPS.


def lpips_golden():
    arrays = golden_map.under(golden_map.read("lpips_vgg"), "reduced/")
    return arrays, tuple(int(w) for w in arrays["widths"])


def test_lpips_of_torchvision_and_heads():
    arrays, widths = lpips_golden()
    official = golden_map.under(arrays, "params/")
    make = functools.partial(perceptual.LPIPS, "vgg", widths=widths)
    model = load(make, critic_names.lpips_table("vgg", "torchvision", widths), official)
    a, b = (golden_map.last((arrays[k] + 1) / 2) for k in ("input", "target"))
    expected = arrays["distance_none"].ravel()
    np.testing.assert_allclose(run(model, a, b), expected, rtol=1e-5)


SLICES = {
    "vgg": {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)},
    "alex": {1: (0,), 2: (3,), 3: (6,), 4: (8,), 5: (10,)},
}


def random_lpips(backbone):
    """Returns a state dict of the package lpips, its names in its order."""
    _, _, shapes = shapes_of(functools.partial(perceptual.LPIPS, backbone))
    official = {
        "scaling_layer.shift": np.float32([-0.030, -0.088, -0.188]),
        "scaling_layer.scale": np.float32([0.458, 0.448, 0.450]),
    }
    official = {k: v.reshape(1, 3, 1, 1) for k, v in official.items()}
    for i, positions in SLICES[backbone].items():
        for j, position in enumerate(positions, start=1):
            kh, kw, c, o = shapes[f"conv{i}_{j}.kernel"]
            for name, shape in (("weight", (o, c, kh, kw)), ("bias", (o,))):
                key = f"net.slice{i}.{position}.{name}"
                official[key] = seeded.weight(key, shape)
    heads = [
        np.abs(seeded.weight(f"lin{k}", (1, *shapes[f"head{k + 1}"], 1, 1)))
        for k in range(5)
    ]
    official |= {f"lin{k}.model.1.weight": head for k, head in enumerate(heads)}
    return official, heads


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_of_the_package(backbone):
    """The layout of taming-transformers, and that of lpips, which repeats the heads."""
    official, heads = random_lpips(backbone)
    make = functools.partial(perceptual.LPIPS, backbone)
    table = critic_names.lpips_table(backbone)
    load(make, table, official)
    copies = {f"lins.{k}.model.1.weight": head for k, head in enumerate(heads)}
    model = load(make, table, official | copies)
    for k, head in enumerate(heads):
        np.testing.assert_array_equal(getattr(model, f"head{k + 1}")[...], head.ravel())


def test_lpips_of_the_alexnet_of_torchvision():
    """Its classifier is carried along; trunk and heads are those of the package."""
    official, _ = random_lpips("alex")
    renamed = {
        "features." + name.split(".", 2)[2] if name.startswith("net.") else name: value
        for name, value in official.items()
        if not name.startswith("scaling_layer")
    }
    classifier = {"classifier.1.weight": np.ones((4, 2), np.float32)}
    make = functools.partial(perceptual.LPIPS, "alex")
    table = critic_names.lpips_table("alex", "torchvision")
    first = load(make, table, renamed | classifier)
    second = load(make, critic_names.lpips_table("alex"), official)
    jax.tree.map(np.testing.assert_array_equal, *map(nnx.state, (first, second)))


def test_foreign_moments_of_images_are_refused():
    official, _ = random_lpips("alex")
    official["scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    with pytest.raises(ValueError, match=r"scaling_layer\.shift"):
        load(
            functools.partial(perceptual.LPIPS, "alex"),
            critic_names.lpips_table("alex"),
            official,
        )


def test_unknown_layouts_are_refused():
    with pytest.raises(ValueError, match="'squeeze'.*vgg"):
        critic_names.lpips_table("squeeze")
    with pytest.raises(ValueError, match="'timm'.*torchvision"):
        critic_names.lpips_table("vgg", "timm")
