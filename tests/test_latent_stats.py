"""Mean and variance of latents: exact in one pass, or by the official average."""

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.models import rae
from rae_jax.trainers import frozen, inputs, latent_stats, registry
from rae_jax.training import sharding

NUM_IMAGES = 1024  # Of the synthetic source.


@pytest.fixture(scope="module")
def images():
    config = chain.load("latent_stats")
    source = inputs.open_source(config.data, "train")
    return np.stack([source[i]["image"] for i in range(NUM_IMAGES)])


@pytest.fixture(scope="module")
def latents(images):
    """Latents of all images and of their mirror images, (2, 1024, 4, 4, 32)."""
    block = chain.encoder()
    encoder = nnx.merge(frozen.encoder(block)[0], frozen.load_encoder(block, "."))
    encode = jax.jit(lambda x: rae.encode(encoder, inputs.to_float(x)))
    both = np.stack([encode(images), encode(images[:, :, ::-1])])
    return both.astype(np.float64)


def run(batches, config, num_devices=1):
    """Statistics of (images, mask) batches by the trainer's own step."""
    mesh = sharding.make_mesh(num_devices)
    with jax.set_mesh(mesh):
        design = latent_stats.design(config)
        params = frozen.load_encoder(config.encoder, ".")
        networks = sharding.place({"encoder": params}, mesh)
        state, step = design.init(jax.random.key(0)), jax.jit(design.step)
        rows = sharding.batch_sharding(mesh)
        for image, mask in batches:
            batch = jax.device_put({"image": image, "mask": mask}, rows)
            state, _ = step(state, networks, batch, jax.random.key(0))
    return latent_stats.statistics(jax.device_get(state), config.mode)


def padded(images, size):
    """Batches of equal size; copies of the last image fill the last one."""
    for start in range(0, len(images), size):
        index = np.arange(start, start + size)
        mask = (index < len(images)).astype(np.float32)
        yield images[np.minimum(index, len(images) - 1)], mask


def assert_statistics(found, z, tolerance=1e-5):
    """Against float64, relative to the largest deviation or variance."""
    z = z.reshape(-1, *z.shape[-3:])
    mean, var = z.mean(axis=0), z.var(axis=0)
    np.testing.assert_allclose(found["mean"], mean, atol=tolerance * np.abs(mean).max())
    np.testing.assert_allclose(found["var"], var, atol=tolerance * var.max())
    assert found["mean"].dtype == found["var"].dtype == np.float32


@pytest.mark.parametrize("both_orientations", [False, True])
@pytest.mark.parametrize("batch_size", [48, 200, 1000])
def test_one_pass_is_exact_for_any_batches_and_order(
    images, latents, batch_size, both_orientations
):
    """No size divides 1024, so the last batch is padded; the order is random."""
    config = chain.load(
        "latent_stats",
        f"data.batch_size={batch_size}",
        f"both_orientations={both_orientations}",
    )
    order = np.random.default_rng(batch_size).permutation(NUM_IMAGES)
    found = run(padded(images[order], batch_size), config)
    assert_statistics(found, latents if both_orientations else latents[:1])


@pytest.mark.parametrize("devices", [1, 8])
def test_whole_run_is_exact_on_any_number_of_devices(tmp_path, latents, devices):
    config = chain.load("latent_stats", "data.batch_size=96", "num_steps=0")
    config.mesh.data = devices
    registry.train(config, tmp_path)
    with np.load(tmp_path / frozen.STATS_NAME) as found:
        assert set(found) == {"mean", "var"}
        assert_statistics(found, latents)
    stats = frozen.load_stats(str(tmp_path), config.encoder.sizes, tmp_path)
    z = latents.reshape(-1, 4, 4, 32).astype(np.float32)
    normalised = np.asarray(rae.normalize(z, stats))
    np.testing.assert_allclose(normalised.mean(axis=0), 0, atol=2e-4)
    small = stats["var"] / (stats["var"] + 1e-5)
    np.testing.assert_allclose(normalised.var(axis=0), small, atol=1e-3)


def test_a_large_offset_does_not_cancel():
    """Mean 1000, deviation 0.1: float32 leaves 1e-4 of the mean's rounding.

    Sums of squares would leave nothing: float32 resolves 1e6 to 0.06.
    """
    rng = np.random.default_rng(0)
    z = (1e3 + 0.1 * rng.standard_normal((512, 2, 2, 8))).astype(np.float32)
    state = latent_stats.create_state((2, 2, 8), "exact")
    for part in np.split(z, 16):
        state = latent_stats.add_exact(state, part, jnp.ones(32))
    found = latent_stats.statistics(state, "exact")
    exact = z.astype(np.float64)
    np.testing.assert_allclose(found["mean"], exact.mean(axis=0), atol=2e-4)
    np.testing.assert_allclose(found["var"], exact.var(axis=0), rtol=2e-3)


def test_rows_that_are_masked_count_nothing():
    z = np.random.default_rng(0).standard_normal((8, 1, 1, 3)).astype(np.float32)
    empty = latent_stats.create_state((1, 1, 3), "exact")
    some = latent_stats.add_exact(empty, z, jnp.asarray([1.0] * 5 + [0.0] * 3))
    found = latent_stats.statistics(some, "exact")
    assert_statistics(found, z[:5].astype(np.float64))
    none = latent_stats.add_exact(some, z, jnp.zeros(8))
    for name in ("count", "mean", "scatter"):
        np.testing.assert_array_equal(getattr(none, name), getattr(some, name))


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_momentum_repeats_the_official_recursion(images, latents, momentum):
    """mean <- 0.9 mean + 0.1 batch mean, from 0 and 1, with biased variances."""
    config = chain.load(
        "latent_stats",
        "data.batch_size=128",
        "mode=momentum",
        f"momentum={momentum}",
        "both_orientations=False",
    )
    mean, var = np.zeros((4, 4, 32)), np.ones((4, 4, 32))
    for z in np.split(latents[0], 8):
        mean = (1 - momentum) * mean + momentum * z.mean(axis=0)
        var = (1 - momentum) * var + momentum * z.var(axis=0)
    found = run(padded(images, 128), config)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5 * np.abs(mean).max())
    np.testing.assert_allclose(found["var"], var, atol=1e-5)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="'exat'.*Did you mean 'exact'"):
        latent_stats.design(chain.load("latent_stats", "mode=exat"))
