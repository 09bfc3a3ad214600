"""Samples that do not depend on batches or devices, and guidance in the sampler."""

import dataclasses

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax import config as configs
from rae_jax.evaluation import generate
from rae_jax.trainers import frozen, generation, latent_diffusion, scores
from rae_jax.training import sharding

LABELS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], np.int32)


@pytest.fixture(scope="module")
def generator(runs):
    """The chain's generator, its network perturbed: a new one predicts zero."""
    loaded = generation.load(runs / "latent_diffusion")
    leaves, treedef = jax.tree.flatten(loaded.params["dit"])
    rng = np.random.default_rng(0)
    leaves = [np.asarray(p) + 0.05 * rng.standard_normal(p.shape) for p in leaves]
    dit = treedef.unflatten([p.astype(np.float32) for p in leaves])
    dit["y_embedder"]["table"] *= 40  # Classes matter.
    params = loaded.params | {"dit": sharding.place(dit, loaded.mesh)}
    return dataclasses.replace(loaded, params=params)


def on_devices(generator, count):
    mesh = sharding.make_mesh(count)
    params = sharding.place(jax.device_get(generator.params), mesh)
    return dataclasses.replace(generator, mesh=mesh, params=params)


def images_of(generator, batch_size, *, scale=1.5, seed=7):
    options = dict(scale=scale, seed=seed, batch_size=batch_size)
    parts = list(generator.images(LABELS, **options))
    return np.concatenate(parts), [len(part) for part in parts]


def record(index, labels):
    """Stands for a sampler: one pixel with the noise, the index and the label."""
    eps = generate.sample_noise(3, index, (4, 4, 2))
    numbers = jnp.stack([index, labels], axis=1).astype(jnp.float32)
    return jnp.concatenate([eps.reshape(-1, 32), numbers], axis=1)


def collect(batch_size, devices):
    rows = sharding.batch_sharding(sharding.make_mesh(devices))
    parts = list(generate.generate(jax.jit(record), LABELS, batch_size, rows))
    return np.concatenate(parts)


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (3, 1), (8, 8), (3, 8)])
def test_noise_and_labels_do_not_depend_on_batches(batch_size, devices):
    """Bit-equal, also where the batch is raised to a multiple of the devices."""
    found, expected = collect(batch_size, devices), collect(len(LABELS), 1)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found[:, -2], np.arange(len(LABELS)))
    np.testing.assert_array_equal(found[:, -1], LABELS)


def test_noise_is_normal_and_differs_by_seed_and_index():
    noise = np.asarray(generate.sample_noise(0, jnp.arange(64), (8, 8, 16)))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert np.abs(noise[0] - noise[1]).max() > 1
    other = np.asarray(generate.sample_noise(1, jnp.arange(64), (8, 8, 16)))
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02


def test_last_batch_is_filled_up_and_cut():
    """Every call has one shape, so that one program is compiled."""
    seen = []

    def sample(index, labels):
        seen.append((np.asarray(index).tolist(), np.asarray(labels).tolist()))
        return index[:, None]

    rows = sharding.batch_sharding(sharding.make_mesh(1))
    labels = np.array([5, 6, 7, 8, 9], np.int32)
    parts = list(generate.generate(sample, labels, 3, rows))
    assert [part.ravel().tolist() for part in parts] == [[0, 1, 2], [3, 4]]
    assert seen == [([0, 1, 2], [5, 6, 7]), ([3, 4, 4], [8, 9, 9])]


@pytest.mark.parametrize(("count", "classes"), [(50, 10), (23, 10), (7, 1000)])
def test_labels_are_balanced(count, classes):
    labels = generate.balanced_labels(count, classes, seed=0)
    assert labels.shape == (count,) and labels.dtype == np.int32
    counts = np.bincount(labels, minlength=classes)
    expected = count // classes + (np.arange(classes) < count % classes)
    np.testing.assert_array_equal(counts, expected)
    assert (np.diff(labels) < 0).any()  # Not sorted.
    other = generate.balanced_labels(count, classes, seed=1)
    assert (other != labels).any()


def test_images_do_not_depend_on_batches_or_devices(generator):
    """Within one level of 255: float32 sums differ in their order."""
    expected, sizes = images_of(on_devices(generator, 1), 8)
    assert expected.shape == (11, 32, 32, 3) and expected.dtype == np.uint8
    assert sizes == [8, 3]
    assert expected.std() > 5  # Not one colour.
    for devices, batch_size in ((1, 1), (1, 3), (8, 8)):
        found, _ = images_of(on_devices(generator, devices), batch_size)
        difference = np.abs(found.astype(int) - expected.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    other, _ = images_of(on_devices(generator, 1), 8, seed=8)
    assert np.abs(other.astype(int) - expected.astype(int)).mean() > 1


def latents_of(generator, scale, keep=(), count=4):
    """Normalised latents and states."""
    index = np.arange(count, dtype=np.int32)
    params = jax.device_get(generator.params)
    drawn = generator.draw(scale, keep)(params, 7, index, LABELS[:count])
    return drawn.x, drawn.states


def test_latents_do_not_depend_on_batches(generator):
    four, _ = latents_of(generator, 1.5)
    two, _ = latents_of(generator, 1.5, count=2)
    np.testing.assert_allclose(four[:2], two, atol=2e-4 * np.abs(four).max())


def test_guidance_of_one_is_none(generator):
    """The limit of the doubled batch; and any other scale changes the sample."""
    plain, _ = latents_of(generator, 1.0)
    near, _ = latents_of(generator, 1.0 + 1e-6)
    largest = np.abs(plain).max()
    np.testing.assert_allclose(near, plain, atol=1e-4 * largest)
    far, _ = latents_of(generator, 3.0)
    assert np.abs(far - plain).max() > 0.01 * largest
    # An interval that holds no time of the grid switches guidance off.
    plan = dataclasses.replace(generator.plan, interval=(0.4, 0.45))
    outside, _ = latents_of(dataclasses.replace(generator, plan=plan), 3.0)
    np.testing.assert_allclose(outside, plain, atol=1e-4 * largest)


def test_runs_may_name_a_guide(runs, generator):
    """By its own path from the workdir; a network that guides itself is unguided."""
    block = dict(guidance="autoguidance", guide="../latent_diffusion")
    loaded = generation.load(runs / "latent_diffusion", **block)
    guide = sharding.place(generator.params["dit"], loaded.mesh)
    params = loaded.params | {"dit": guide, "guide": guide}
    itself = dataclasses.replace(loaded, params=params)
    plain, _ = latents_of(itself, 1.0)
    guided, _ = latents_of(itself, 3.0)
    np.testing.assert_allclose(guided, plain, atol=1e-5 * np.abs(plain).max())
    params = params | {"guide": loaded.params["dit"]}
    other, _ = latents_of(dataclasses.replace(itself, params=params), 3.0)
    assert np.abs(other - plain).max() > 0.01 * np.abs(plain).max()


def test_pictures_while_training(runs):
    """Of the EMA weights, as the finished run makes them."""
    workdir = runs / "latent_diffusion"
    found = scores.run_scores(workdir)
    loaded = generation.load(workdir)
    labels = np.repeat(np.arange(10), latent_diffusion.PICTURES_PER_CLASS)
    options = dict(scale=1.0, seed=loaded.config.seed, batch_size=8)
    images = np.concatenate(list(loaded.images(labels, **options)))
    assert found["sample_std"] == pytest.approx(images.std() / 255, rel=0.01)
    assert (workdir / "samples.png").is_file()


def test_states_lead_from_noise_to_the_sample(generator):
    last = generator.config.sampling.num_points - 1
    z, states = latents_of(generator, 1.5, keep=(0, 2, last))
    assert states.shape == (3, 4, 4, 4, 32)
    np.testing.assert_array_equal(states[-1], z)
    eps = generate.sample_noise(7, jnp.arange(4), (4, 4, 32))
    # Alone and inside a larger program, the inverse error function rounds differently.
    np.testing.assert_allclose(states[0], eps, rtol=1e-6)

    decoded = generator.states(LABELS[:4], (0, last), scale=1.5, seed=7)
    assert decoded.shape == (2, 4, 32, 32, 3)
    images, _ = images_of(generator, 8)
    pixels = np.floor(np.clip(decoded[-1], 0, 1) * 255)
    assert np.abs(pixels - images[:4]).max() <= 1


def test_untrained_network_moves_nothing(generator):
    """A new DiT-DH predicts zero velocity: the sample is decoded noise."""
    untrained = generator.untrained()
    last = generator.config.sampling.num_points - 1
    z, states = latents_of(untrained, 1.0, keep=(0, last))
    np.testing.assert_allclose(states[0], z, atol=1e-5)
    assert generator.params["dit"] is not untrained.params["dit"]
    for name in ("stats", "decoder"):
        assert untrained.params[name] is generator.params[name]
    found, _ = images_of(untrained, 8, scale=1.0)
    trained, _ = images_of(generator, 8, scale=1.0)
    assert np.abs(found.astype(int) - trained.astype(int)).mean() > 1


def test_runs_that_cannot_generate(runs, tmp_path):
    with pytest.raises(configs.ConfigError, match="not of 'latent_diffusion'"):
        generation.load(runs / "rae_decoder")
    with pytest.raises(configs.ConfigError, match="denoises and does not generate"):
        generation.load(runs / "ldae")
    with pytest.raises(configs.ConfigError, match="not of 'rae_decoder'"):
        generation.load(runs / "latent_diffusion", str(runs / "ldae"))
    config = chain.load("latent_diffusion")  # Its smoke variant has no decoder.
    configs.save_config(config, tmp_path / "config.json")
    with pytest.raises(configs.ConfigError, match="give the workdir .* --decoder"):
        generation.load(tmp_path)
    generator = generation.load(runs / "latent_diffusion", str(runs / "rae_decoder"))
    assert generator.num_classes == 10
    frozen.check_shapes(
        "The encoder",
        frozen.encoder(generator.config.encoder)[1],
        generator.decoder.params["encoder"],
    )
