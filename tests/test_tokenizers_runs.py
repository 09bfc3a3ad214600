"""Tokenizers of runs: made once, measured, stored, read again; and their trainer."""

from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax import config as configs
from rae_jax.data import sources
from rae_jax.losses import adversarial, autoencoding
from rae_jax.models import autoencoder_kl, learned_tokenizers
from rae_jax.trainers import (
    inputs,
    registry,
    tokenizer,
    tokenizer_critic,
    tokenizer_networks,
    tokenizing,
    weights,
)
from rae_jax.training import checkpoints, sharding, state

CONFIGS = Path(__file__).parent.parent / "configs"
TRAINED = ("patch_ae", "patch_vae", "conv_vae", "sd_vae")
SLOW = pytest.mark.slow
CONV = pytest.param("conv_vae", marks=SLOW)
SIZES = dict(block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2)


def make_config(name, **changes):
    """An l-DAE config as far as tokenizers read it."""
    trained = name in TRAINED
    block = blocks.tokenizer(
        name=name,
        patch_size=8,
        latent_dim=192 if name == "pixels" else 16,
        num_images=1024,
        weights="random" if trained else "",
    )
    block["sizes"] |= dict(SIZES)
    return ConfigDict(dict(data=blocks.synthetic(), tokenizer=block | changes))


def build(config, workdir):
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        return tokenizing.build(config, workdir, mesh)


@pytest.fixture(scope="module")
def held_out():
    source = sources.Synthetic(num_images=1020, image_size=32, seed=1)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    return images.astype(np.float32) / 127.5 - 1


encode = jax.jit(lambda code, *args: code.encode(*args))


@pytest.mark.parametrize("name", ["pca", "pixels", "patch_ae", "patch_vae", CONV])
def test_latents_of_a_run_have_deviation_one(name, held_out, tmp_path):
    """Held-out images, drawn where they are random, 1e-2; shapes are those foretold."""
    config = make_config(name)
    found, foretold = build(config, tmp_path), tokenizing.abstract(config)
    assert jax.tree.structure(found) == jax.tree.structure(foretold)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(foretold), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    z = encode(found, held_out, jax.random.key(0))
    assert z.shape == (1020, 16, config.tokenizer.latent_dim)
    assert abs(np.std(z) - 1) < 1e-2
    again = tokenizing.load(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_scale_may_be_each_channels_own_or_none(held_out, tmp_path):
    config = make_config("patch_vae", norm="per_channel")
    z = encode(build(config, tmp_path), held_out, jax.random.key(0))
    np.testing.assert_allclose(np.std(z, axis=(0, 1)), 1, atol=0.05)
    plain = build(make_config("patch_vae", norm="none"), tmp_path)
    np.testing.assert_array_equal(plain.scale, 1)


def test_measured_moments_do_not_depend_on_batches():
    """Those of whole arrays in float64, 1e-5; padding counts nothing."""
    config = make_config("patch_vae", num_images=100)
    mesh = sharding.make_mesh()
    code = tokenizer_networks.wrap(
        config.tokenizer,
        tokenizer_networks.make_network(config.tokenizer, 32, rngs=nnx.Rngs(0)),
        jnp.full(16, 3.0),
    )
    with jax.set_mesh(mesh):
        found = tokenizing.measure(code, config, mesh)
    with inputs.eval_batches(config.data, "train", limit=100) as batches:
        seen = [batch["image"][batch["mask"] > 0] for batch in batches]
    images = np.concatenate(seen).astype(np.float32) / 127.5 - 1
    mean, variance = (np.asarray(x, np.float64) for x in code.moments(images))
    assert len(images) == 100
    np.testing.assert_allclose(found["mean"], mean.mean(axis=(0, 1)), atol=1e-5)
    expected = mean.var(axis=(0, 1)) + variance.mean(axis=(0, 1))
    np.testing.assert_allclose(found["var"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["pca", "patch_ae"])
def test_a_resumed_run_keeps_its_tokenizer_and_a_new_one_makes_its_own(name, tmp_path):
    """What an interrupted run has left of one is no tokenizer."""
    config = make_config(name, num_images=64)
    (tmp_path / ".tokenizer.partial").mkdir()
    first = build(config, tmp_path)
    with mock.patch.object(checkpoints, "finished_step", return_value=2):
        names = ("fit_pca", "measure")
        with mock.patch.multiple(tokenizing, **{n: mock.DEFAULT for n in names}) as m:
            again = build(config, tmp_path)
        assert not any(m[n].called for n in names)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    config.tokenizer.num_images = 32
    other = build(config, tmp_path)  # There is no checkpoint.
    assert np.abs(other.scale - first.scale).max() > 1e-6


def test_one_fit_serves_other_runs(tmp_path):
    first = build(make_config("pca", num_images=64), tmp_path / "first")
    config = make_config("pca", weights="../first", latent_dim=5, norm="none")
    with mock.patch.object(tokenizing, "fit_pca") as fit:
        other = build(config, tmp_path / "second")
    assert not fit.called and other.latent_dim == 5
    np.testing.assert_array_equal(other.basis, first.basis)
    config.tokenizer.patch_size = 4
    with pytest.raises(configs.ConfigError, match="patches of 8 pixels, not.* = 4"):
        build(config, tmp_path / "second")
    config.tokenizer.weights = "../third"
    with pytest.raises(configs.ConfigError, match="third' does not exist.*to fit them"):
        build(config, tmp_path / "second")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pca", dict(latent_dim=193), "latent_dim = 193 is not within 1 and the 192"),
        ("patch_vae", dict(latent_dim=0), "latent_dim = 0 is not within"),
        ("pca", dict(patch_size=7), "32 is not a multiple of tokenizer.patch_size = 7"),
        ("pixels", dict(latent_dim=16), "has 192 values, and pixels keep them all"),
        ("conv_vae", dict(latent_dim=6), "6 is not a multiple of 4.*2 x 2 latents"),
        ("conv_vae", dict(patch_size=16), "the 3 levels .*make tokens of 8 pixels"),
        ("pcaa", {}, "tokenizer.name 'pcaa'. Did you mean 'pca'"),
        ("pca", dict(norm="globl"), "tokenizer.norm 'globl'. Did you mean 'global'"),
        ("pca", dict(num_images=0), "num_images must be positive, got 0"),
        ("sd_vae", dict(weights=""), "weights is empty.*stabilityai/sd-vae-ft-ema"),
        ("patch_ae", dict(weights=""), "weights is empty.*configs/tokenizer.py"),
    ],
)
def test_tokenizers_that_cannot_be_are_refused_by_shapes(name, changes, message):
    with pytest.raises(configs.ConfigError, match=message):
        tokenizing.abstract(make_config(name, **changes))


@pytest.mark.parametrize("name", ["pca", "conv_vae"])
def test_unfitted_tokenizers_are_refused(name, tmp_path):
    with pytest.raises(configs.ConfigError, match=f"no fitted tokenizer .'{name}'"):
        tokenizing.load(tmp_path, make_config(name))


def test_scales_of_nothing_are_refused(tmp_path):
    config = make_config("patch_ae", num_images=8)
    nothing = {"mean": np.zeros(16), "var": np.zeros(16)}
    measuring = mock.patch.object(tokenizing, "measure", return_value=nothing)
    with measuring, pytest.raises(ValueError, match="All latents are the same"):
        build(config, tmp_path)
    with pytest.raises(configs.ConfigError, match="no fitted tokenizer"):
        tokenizing.load(tmp_path, config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of runs, among them one of a patch autoencoder."""
    folder = tmp_path_factory.mktemp("tokenizers")
    overrides = ["num_steps=1", "mesh.data=1", "every.checkpoint=1", "every.evaluate=9"]
    config = configs.load_config(
        f"{CONFIGS / 'tokenizer.py'}:smoke_ae", [f"--config.{o}" for o in overrides]
    )
    registry.train(config, folder / "ae")
    return folder


def test_a_trained_tokenizer_is_read_with_its_averaged_weights(trained):
    config = make_config("patch_ae", weights="../ae", latent_dim=8, norm="none")
    found = build(config, trained / "ldae")
    params = checkpoints.load_params(trained / "ae", ("ema_params",))
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    moved = (trained / "ae").rename(trained / "gone")  # The run has its own copy.
    again = tokenizing.load(trained / "ldae", config)
    moved.rename(trained / "ae")
    jax.tree.map(np.testing.assert_array_equal, again, found)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("patch_ae", {}, "latent_dim = 16, the run has 8"),
        ("patch_vae", dict(latent_dim=8), "name = 'patch_vae', the run has 'patch_ae'"),
        ("patch_ae", dict(latent_dim=8, patch_size=4), "patch_size = 4, the run has 8"),
        ("patch_ae", dict(weights="../none"), "none' does not exist. Train it with"),
        ("patch_ae", dict(weights="../other"), "holds a run of 'ldae', not of 'token"),
        ("sd_vae", dict(weights="no/where/at/all"), "no file or folder"),
    ],
)
def test_wrong_weights_are_named(trained, name, changes, message):
    (trained / "other").mkdir(exist_ok=True)
    ldae = configs.load_config(f"{CONFIGS / 'ldae.py'}:smoke")
    configs.save_config(ldae, trained / "other" / checkpoints.CONFIG_NAME)
    config = make_config(name, **(dict(weights="../ae") | changes))
    with pytest.raises((configs.ConfigError, FileNotFoundError), match=message):
        build(config, trained / "ldae")


def test_published_autoencoders_are_read_from_folders_of_diffusers(tmp_path):
    config = make_config("sd_vae", weights="../vae", norm="none", num_images=8)
    arguments = tokenizer_networks.kl_arguments(config.tokenizer, 32)
    model = nnx.jit(
        lambda: autoencoder_kl.AutoencoderKL(**arguments, rngs=nnx.Rngs(5))
    )()
    model.save_pretrained(tmp_path / "vae", "diffusers")
    found = build(config, tmp_path / "run")
    expected = learned_tokenizers.ConvCode.of(model, jnp.ones(16))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found.arguments.count('"scaling_factor": 0.18215') == 1
    config.tokenizer.latent_dim = 32
    with pytest.raises(
        configs.ConfigError, match="latent_channels = 8, the files .* 4"
    ):
        build(config, tmp_path / "run")


@pytest.mark.slow
def test_convolutional_runs_are_autoencoders_to_convert(tmp_path):
    config = load("smoke_conv")
    config.tokenizer.sizes.update(SIZES)
    configs.save_config(config, tmp_path / checkpoints.CONFIG_NAME)
    model = nnx.jit(lambda: tokenizer.make_model(config)(rngs=nnx.Rngs(3)))()
    params = state.param_dict(model)
    with mock.patch.object(checkpoints, "load_params", return_value=params) as read:
        opened = weights.open_run(tmp_path, None, "ema", {})
    assert read.call_args.args == (tmp_path, ("ema_params",))
    assert opened.kind == weights.KL and opened.arguments["scaling_factor"] == 1.0
    loaded = state.param_dict(weights.load(opened))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# The trainer

TOKENIZERS = configs.load_module(CONFIGS / "tokenizer.py")


def load(variant, *overrides):
    path = f"{CONFIGS / 'tokenizer.py'}:{variant}"
    return configs.load_config(path, [f"--config.{o}" for o in overrides])


def test_every_row_finds_its_tokenizer():
    """Runs that rows of l-DAE name are variants here, of the sizes that they expect."""
    rows = configs.load_module(CONFIGS / "ldae.py")
    found = set()
    for variant in rows.VARIANTS:
        config = rows.get_config(variant)
        tokenizing.check(config)
        path = config.tokenizer.weights
        if path.startswith("../"):
            run = TOKENIZERS.get_config(path.removeprefix("../"))
            tokenizer_networks._check_run(config.tokenizer, run.tokenizer, path)
            assert config.data.image_size == run.data.image_size
            found.add(path)
    assert len(found) > 40


@pytest.mark.parametrize(
    "variant", [pytest.param("vqgan_full", marks=SLOW), "patch_vae_d16"]
)
def test_full_size_steps_by_shape(variant):
    design = registry.design(load(variant))
    before = jax.eval_shape(design.init, jax.random.key(0))
    after, metrics = design.abstract_step()
    same = jax.tree.map(lambda a, b: a.shape == b.shape, before, after)
    assert all(jax.tree.leaves(same)) and {"loss_rec", "loss_kl"} <= set(metrics)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.name=sd_vae", "'sd_vae' is not trained"),
        ("tokenizer.name=pca", "'pca' is not trained"),
        ("critic.weight=0.5", "'patch_vae' has no last convolution"),
        ("loss.error=l3", "loss.error 'l3'"),
        ("tokenizer.latent_dim=193", "latent_dim = 193"),
    ],
)
def test_runs_that_cannot_be_are_refused(override, message):
    extra = ["tokenizer.latent_dim=16"] if "sd_vae" in override else []
    with pytest.raises(configs.ConfigError, match=message):
        registry.design(load("smoke", *extra, override))


@pytest.fixture(scope="module")
def critic_step():
    """A step with a critic that is heard, and what it is made of."""
    overrides = ("loss.kl_weight=0.01", "critic.start=0")
    config = load("smoke_vqgan", *overrides, "critic.optimizer.peak_lr=5e-3")
    config.loss.error = "l2"  # Its gradient has no jumps that rounding could cross.
    config.tokenizer.sizes.update(block_out_channels=(4, 8), norm_num_groups=2)
    config.tokenizer.patch_size = 4
    config.data.update(image_size=16, batch_size=4)
    config.loss.perceptual_weight = 0.0
    make = lambda rngs: tokenizer_networks.make_network(  # noqa: E731
        config.tokenizer, 16, rngs=rngs
    )
    training = tokenizer_critic.CriticTraining(config, make)
    run = jax.jit(training.init)(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    return config, training, run, jnp.asarray(images)


def test_gradients_are_those_of_the_weighted_sum(critic_step):
    """Against automatic differentiation of it, the weight taken as a constant."""
    config, training, run, images = critic_step
    key = jax.random.key(1)
    grads, metrics = jax.jit(training._gradients(run, {}))(
        run.params, {"image": images}, key
    )

    def terms(params):
        model = nnx.merge(training.graphdef, params)
        x = 2 * inputs.to_float(images) - 1
        mean, log_variance = learned_tokenizers.posterior(model, x)
        z = autoencoding.draw(mean, log_variance, key)
        recon = learned_tokenizers.images_of(model, z)
        kl = jnp.mean(autoencoding.kl_divergence(mean, log_variance))
        logits = training._logits(run.critic.params, recon)
        error = jnp.sum((recon - x) ** 2) / len(x)
        return jnp.stack([error, 0.01 * kl, adversarial.generator_loss(logits)])

    by_term = jax.jit(jax.jacobian(terms))(run.params)
    last = by_term["decoder"]["conv_out"]["kernel"]
    norms = [float(jnp.linalg.norm(last[i])) for i in (0, 2)]
    weight = 0.5 * min(norms[0] / (norms[1] + 1e-4), 1e4)
    np.testing.assert_allclose(metrics["disc_weight"], weight, rtol=1e-4)
    expected = jax.tree.map(lambda g: g[0] + g[1] + weight * g[2], by_term)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * largest)
    values = jax.jit(terms)(run.params)
    np.testing.assert_allclose(metrics["loss_gan"], values[2], rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_rec"], values[0] / 768, rtol=1e-5)


def test_weight_counts_beside_the_mean_error_if_it_is_not_adaptive(critic_step):
    config, training, run, _ = critic_step
    kernels = {"rec": jnp.ones(3), "gan": jnp.ones(3)}
    assert float(training._weight(kernels, run.step, 768)) == pytest.approx(0.5, 1e-3)
    critic = config.critic.copy_and_resolve_references()
    critic.adaptive = False
    with mock.patch.object(training, "config", ConfigDict(dict(critic=critic))):
        assert float(training._weight(kernels, run.step, 768)) == 0.5 * 768
        critic.start = 1
        assert float(training._weight(kernels, run.step, 768)) == 0.0


def test_critic_learns_to_tell_images_apart(critic_step):
    """By twenty updates on one batch."""
    _, training, run, images = critic_step
    update = jax.jit(training._update)
    critic, losses = run.critic, []
    for i in range(20):
        critic, metrics = update(
            critic, run.params, {"image": images}, jax.random.key(i)
        )
        losses.append(float(metrics["loss_disc"]))
    assert int(critic.step) == 20 and float(metrics["disc_accuracy"]) > 0.9
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_step_trains_both_players(critic_step):
    """The critic on what the updated autoencoder makes; both move."""
    _, training, run, images = critic_step
    new, metrics = jax.jit(training.step)(run, {}, {"image": images}, jax.random.key(2))
    moved = [
        jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), old, now)
        for old, now in (
            (run.params, new.params),
            (run.critic.params, new.critic.params),
        )
    ]
    assert all(max(jax.tree.leaves(tree)) > 0 for tree in moved)
    assert 0 < metrics["loss_disc"] < 3 and np.isfinite(metrics["loss"])
