"""The five trainers: losses fall, probes probe, frozen networks are checked."""

from types import SimpleNamespace

import chain
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from rae_jax import config as configs
from rae_jax.layers import patches
from rae_jax.models import ldae_encoder, tokenizers
from rae_jax.trainers import (
    frozen,
    inputs,
    latent_diffusion,
    ldae,
    places,
    probe,
    probe_heads,
    rae_decoder,
    registry,
    tokenizing,
)
from rae_jax.training import checkpoints, flops, logs, sharding, state


def losses_on_one_batch(config, folder, steps):
    """Loss of every step on the first batch of the run, over and over."""
    with jax.set_mesh(sharding.make_mesh(1)):
        mesh = sharding.make_mesh(1)
        program = registry.trainer(config).build(config, folder, mesh)
        batches = program.batches()
        batch = jax.tree.map(jnp.asarray, next(batches))
        batches.close()
        run_state = jax.jit(program.design.init)(jax.random.key(0))
        step = jax.jit(program.design.step)
        losses = []
        for _ in range(steps):
            run_state, metrics = step(
                run_state, program.frozen, batch, jax.random.key(1)
            )
            losses.append(float(metrics["loss"]))
    return np.asarray(losses)


CONVOLUTIONS = pytest.mark.optimised  # They take ten times as long if they are not.


@pytest.mark.parametrize(
    ("name", "overrides", "steps", "share"),
    [
        ("ldae", [], 60, 0.5),
        ("rae_decoder", ["loss.perceptual_weight=0.0", "noise.tau=0.0"], 60, 0.5),
        pytest.param(
            *("rae_decoder", ["loss.perceptual=alex", "noise.tau=0.0"], 60, 0.6),
            marks=CONVOLUTIONS,
        ),
        ("latent_diffusion", [], 100, 0.8),
    ],
)
def test_loss_falls_on_one_batch(tmp_path, name, overrides, steps, share):
    """To this share of its start; noise and levels differ from step to step."""
    config = chain.load(
        name, "optimizer.peak_lr=0.003", "optimizer.schedule=constant", *overrides
    )
    config.model.remat = "none"
    losses = losses_on_one_batch(config, tmp_path, steps)
    assert losses[-10:].mean() < share * losses[:2].mean()


def test_tokenizer_is_fitted_on_the_training_images():
    """Against NumPy on the same crops; a choice of images is a subset."""
    config = chain.load("ldae", "tokenizer.num_images=2000", "data.batch_size=96")
    found = tokenizing.fit_pca(config)
    source = inputs.open_source(config.data, "train")
    images = np.stack([source[i]["image"] for i in range(len(source))]) / 127.5 - 1
    data = np.asarray(patches.patchify(images, 8)).reshape(-1, 192).astype(np.float64)
    np.testing.assert_allclose(found["mean"], data.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(
        found["variances"].sum(), data.var(axis=0).sum(), rtol=1e-5
    )
    config.tokenizer.num_images = 64
    fewer = tokenizing.fit_pca(config)
    assert 1e-4 < np.abs(fewer["mean"] - found["mean"]).max() < 0.2


@pytest.mark.parametrize("target", ["eps", "latent", "image_pca", "image"])
def test_pictures_of_a_perfect_denoiser_show_the_image(target):
    """`denoise` undoes noise and projection for every kind of prediction."""
    config = chain.load("ldae", f"noise.target={target}", "noise.input_space=latent")
    config.noise.schedule = "linear_gamma2"
    components = tokenizing.fit_pca(config)
    pca = tokenizers.make_pca(components, config.tokenizer.latent_dim)
    images = inputs.to_float(jnp.asarray(inputs.examples(config.data, "train", 3)))
    x = patches.patchify(2 * images - 1, 8)
    z = pca.encode_patches(x)
    gamma, sigma = np.sqrt(1 - 401 / 1000), np.sqrt(401 / 1000)

    def perfect(z_t, t):
        assert (t == 400).all()
        answers = {"eps": (z_t - gamma * z) / sigma, "latent": z}
        return answers | {"image_pca": pca.decode_patches(z), "image": x}

    noisy, found = ldae.denoise(
        lambda z_t, t: perfect(z_t, t)[target], pca, images, config
    )
    goal = x if target == "image" else pca.decode_patches(z)
    expected = patches.unpatchify(goal, 8)
    np.testing.assert_allclose(found, (expected + 1) / 2, atol=1e-5)
    assert np.abs(noisy - images).mean() > 0.05


# ---- Latent diffusion


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_share_of_dropped_labels(rate):
    """Of 4096 labels: three standard errors of 0.1 are 0.014."""
    config = chain.load(
        "latent_diffusion", f"model.class_dropout_prob={rate}", "data.image_size=8"
    )
    config.encoder = chain.encoder(image_size=8)
    networks = {
        "encoder": frozen.load_encoder(config.encoder, "."),
        "stats": frozen.load_stats("none", config.encoder.sizes, "."),
    }
    label = np.random.default_rng(0).integers(0, 10, 4096)
    batch = {"image": np.zeros((4096, 8, 8, 3), np.uint8), "label": jnp.asarray(label)}
    loss_fn = latent_diffusion._make_loss(config)

    @jax.jit
    def labels_of_the_model(networks, batch):
        seen = []

        def model(x_t, t, y):
            seen.append(y)
            return x_t

        network = SimpleNamespace(outputs=model)
        loss_fn(network, networks, batch, jax.random.key(0))
        return seen

    (y,) = map(np.asarray, labels_of_the_model(networks, batch))
    dropped = y == 10
    assert abs(dropped.mean() - rate) < 0.014
    np.testing.assert_array_equal(y[~dropped], label[~dropped])


def test_too_few_classes_and_unknown_networks_are_refused(tmp_path):
    few = chain.load("latent_diffusion", "model.num_classes=3")
    with pytest.raises(configs.ConfigError, match="= 3, but the data has 10"):
        registry.train(few, tmp_path)
    unknown = chain.load("latent_diffusion", "network=dit_dhh")
    with pytest.raises(ValueError, match="'dit_dhh'.*Did you mean 'dit_dh'"):
        registry.train(unknown, tmp_path)
    few.trainer = "ldea"
    with pytest.raises(ValueError, match="'ldea'.*Did you mean 'ldae'"):
        registry.train(few, tmp_path)


# ---- Probe


def save_class_folder(root, count, rng, shuffle):
    """Images of ten classes that differ by a faint pattern; labels may be wrong."""
    patterns = np.random.default_rng(0).normal(0, 20, (10, 32, 32, 3))
    labels = np.repeat(np.arange(10), count)
    shown = rng.permutation(labels) if shuffle else labels
    for i, (label, pattern) in enumerate(zip(labels, patterns[shown], strict=True)):
        pixels = 128 + pattern + rng.normal(0, 40, pattern.shape)
        folder = root / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / f"{i}.png")


@pytest.mark.parametrize("shuffle", [False, True])
def test_probe_finds_classes_and_nothing_in_noise(tmp_path, shuffle):
    """100 validation images: above 90%, or within four standard errors of 10%."""
    rng = np.random.default_rng(1)
    save_class_folder(tmp_path / "data" / "train", 24, rng, shuffle)
    save_class_folder(tmp_path / "data" / "val", 10, rng, shuffle)
    config = chain.load("probe", "data.source=class_folder", "data.batch_size=80")
    config.update(num_steps=60, features=("pixels", "pca"), mesh=dict(data=1))
    config.data.update(
        path=str(tmp_path / "data"),
        transform="center_crop",
        flip=False,
        validation_size=100,
    )
    config.optimizer.update(name="adamw", peak_lr=3e-3)
    config.encoder.sizes.latent_dim = 64
    config.every.update(log=60, evaluate=60, checkpoint=0)
    registry.train(config, tmp_path / "run")
    top1 = logs.last_scores(tmp_path / "run", "top1_")
    assert set(top1) == {"top1_pixels", "top1_pca"}
    if shuffle:
        assert max(top1.values()) < 0.22
    else:
        assert top1["top1_pixels"] > 0.9
        assert top1["top1_pca"] > 0.5


def test_probe_features_and_their_widths():
    config = chain.load("probe")
    config.features = probe_heads.FEATURES
    with pytest.raises(ValueError, match="'pixel'.*Did you mean 'pixels'"):
        probe.design(chain.load("probe", "features=('pixel',)"))
    shapes, metrics = probe.design(config).abstract_step()
    widths = {n: p["kernel"].shape for n, p in shapes.params.items()}
    assert widths == {
        "encoder": (1, 32, 10),
        "random": (1, 32, 10),
        "pca": (1, 16 * 8, 10),
        "pixels": (1, 32 * 32 * 3, 10),
    }
    assert {f"loss_{n}" for n in probe_heads.FEATURES} <= set(metrics)

    encoder_def, _ = frozen.encoder(config.encoder)
    params = frozen.load_encoder(config.encoder, ".")
    networks = {"encoder": params, "random": params}
    images = inputs.examples(config.data, "train", 4)
    noise = jnp.arange(4), jax.random.key(0)
    found = probe_heads.extract(config, encoder_def, networks, images, *noise)
    assert all(x.shape[0] == 1 for x in found.values())
    found = {name: x[0] for name, x in found.items()}
    x = images.astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(found["pixels"], x.reshape(4, -1), atol=1e-6)
    np.testing.assert_array_equal(found["random"], found["encoder"])
    tokens = nnx.merge(encoder_def, params).raw_features(x)
    np.testing.assert_allclose(found["encoder"], tokens.mean(axis=1), atol=1e-5)
    blocks = patches.patchify(x, 8)[..., :8]  # An untrained basis is the identity.
    np.testing.assert_allclose(found["pca"], blocks.reshape(4, -1), atol=1e-5)


# ---- Frozen networks


def test_trained_encoder_is_the_half_of_its_run(runs):
    """Weights, tokenizer and level of a run on disk; EMA or not."""
    params = frozen.load_encoder(chain.encoder("../ldae"), runs / "elsewhere")
    expected = frozen.encoder(chain.encoder())[1]
    frozen.check_shapes("The encoder", expected, params)
    encoder = nnx.merge(frozen.encoder(chain.encoder())[0], params)

    config = configs.read_config(runs / "ldae" / checkpoints.CONFIG_NAME)
    net = nnx.merge(
        state.abstract_model(ldae.make_model(config)),
        checkpoints.load_params(runs / "ldae"),
    )
    components = tokenizers.load_components(runs / "ldae" / places.TOKENIZER_NAME)
    pca = tokenizers.make_pca(components, 8)
    images = inputs.examples(config.data, "train", 3).astype(np.float32) / 127.5 - 1
    projected = patches.patchify(pca.decode(pca.encode(images)), 8)
    tokens = net.features(projected, jnp.full(3, 10), 2)
    np.testing.assert_allclose(encoder.raw_features(images), tokens, atol=1e-5)
    assert isinstance(encoder, ldae_encoder.LDAEEncoder)

    block = chain.encoder("../ldae")
    block.ema = False
    raw = frozen.load_encoder(block, runs / "elsewhere")
    leaves = zip(jax.tree.leaves(raw), jax.tree.leaves(params), strict=True)
    assert max(np.abs(a - b).max() for a, b in leaves) > 1e-6


@pytest.mark.parametrize("name", ["rae_decoder", "latent_stats", "latent_diffusion"])
def test_trained_networks_reach_all_devices(runs, name):
    """A checkpoint comes from one device and is read within a mesh of eight."""
    config = configs.read_config(runs / name / checkpoints.CONFIG_NAME)
    mesh = sharding.make_mesh(8)
    with jax.set_mesh(mesh):
        program = registry.trainer(config).build(config, runs / name, mesh)
        assert flops.peak_flops(jax.devices()[0]) > 1e8
    for array in jax.tree.leaves(program.frozen):
        assert len(array.sharding.device_set) == 8


def test_encoders_that_cannot_be_loaded(runs, tmp_path):
    """Every message says what is wrong and names it."""

    def fails(match, weights, error=configs.ConfigError, **sizes):
        with pytest.raises(error, match=match):
            frozen.load_encoder(chain.encoder(weights, **sizes), runs / "new")

    fails("encoder.weights is empty", "")
    fails("holds a run of 'rae_decoder', not of 'ldae'", "../rae_decoder")
    fails("is not the workdir of a run", str(tmp_path / "nothing"))
    wrong = "depth = 9, the run has 3; hidden_size|hidden_size = 64, the run has 32"
    fails(wrong, "../ldae", hidden_size=64, depth=9)
    try:
        sizes = chain.encoder("../ldae", hidden_size=64, depth=9)
        frozen.load_encoder(sizes, runs / "new")
    except configs.ConfigError as error:
        assert "hidden_size = 64, the run has 32" in str(error)
        assert "depth = 9, the run has 3" in str(error)
        assert "num_heads" not in str(error)
    configs.save_config(chain.load("ldae"), tmp_path / "begun" / "config.json")
    fails("holds no checkpoint", str(tmp_path / "begun"), checkpoints.CheckpointError)


def test_all_misfits_are_listed():
    expected = {"a": np.zeros(3), "b": {"c": np.zeros((2, 2)), "d": np.zeros(1)}}
    given = {"a": np.zeros(4), "b": {"c": np.zeros((2, 2))}, "e": np.zeros(5)}
    frozen.check_shapes("The net", expected, expected)
    with pytest.raises(configs.ConfigError) as caught:
        frozen.check_shapes("The net", expected, given)
    assert str(caught.value).splitlines() == [
        "The net does not fit:",
        "  a: expected (3,), got (4,)",
        "  b.d: expected (1,), got None",
        "  e: expected None, got (5,)",
    ]


def test_paths_count_from_the_workdir_first(tmp_path, monkeypatch):
    workdir, here = tmp_path / "runs" / "dit", tmp_path / "here"
    for folder in (tmp_path / "runs" / "ldae", here / "only_here", workdir):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    beside = frozen.resolve("../ldae", workdir)
    assert beside == tmp_path / "runs" / "ldae"
    assert frozen.resolve("only_here", workdir).resolve() == here / "only_here"
    assert frozen.resolve(str(here), workdir) == here
    (workdir / "only_here").mkdir()
    assert frozen.resolve("only_here", workdir) == workdir / "only_here"


def test_statistics_are_found_or_refused(runs, tmp_path):
    sizes = chain.encoder().sizes
    unit = frozen.load_stats("none", sizes, tmp_path)
    assert unit["mean"].shape == unit["var"].shape == (4, 4, 32)
    assert unit["mean"].any() == 0 and (unit["var"] == 1).all()
    file = runs / "latent_stats" / frozen.STATS_NAME
    for path in ("../latent_stats", str(file)):
        stats = frozen.load_stats(path, sizes, runs / "latent_diffusion")
        np.testing.assert_array_equal(stats["mean"], np.load(file)["mean"])
    with pytest.raises(configs.ConfigError, match="does not exist. Make it with"):
        frozen.load_stats("gone.npz", sizes, tmp_path)
    larger = chain.encoder(hidden_size=64).sizes
    with pytest.raises(configs.ConfigError, match=r"\(4, 4, 32\).*\(4, 4, 64\)"):
        frozen.load_stats(str(file), larger, tmp_path)


def test_runs_of_the_chain_left_what_they_promise(runs):
    for name in chain.FILES:
        config = configs.read_config(runs / name / checkpoints.CONFIG_NAME)
        assert registry.is_finished(config, runs / name)
        assert checkpoints.finished_step(runs / name) == chain.STEPS
        (record,) = logs.read_metrics(runs / name)[-1:]
        assert record["step"] == chain.STEPS
    decoder = checkpoints.load_params(runs / "rae_decoder")
    assert all(isinstance(p, np.ndarray) for p in jax.tree.leaves(decoder))
    shapes = nnx.eval_shape(
        lambda: rae_decoder.make_model(chain.load("rae_decoder"))(rngs=nnx.Rngs(0))
    )
    expected = flax.traverse_util.flatten_dict(state.param_dict(shapes))
    found = flax.traverse_util.flatten_dict(decoder)
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in expected.items()
    }
    other = chain.load("ldae", "seed=1")
    assert not registry.is_finished(other, runs / "ldae")
