"""`rae-jax sample` with any sampler, in parts, and what a config may say of it."""

import dataclasses
import functools
import json

import chain
import jax
import networks
import numpy as np
import pytest
from PIL import Image
from test_converted import DIT_DH, RAE, fails, random, run

from rae_jax import config as configs
from rae_jax.diffusion import samplers
from rae_jax.evaluation import generate, writing
from rae_jax.models import dit, dit_dh, rae
from rae_jax.trainers import chains, decoder_scores, generation, registry, sampling
from rae_jax.training import sharding

COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network and an autoencoder, each in our layout."""
    folder = tmp_path_factory.mktemp("weights")
    random(dit_dh.DiTDH, **DIT_DH).save_pretrained(folder / "model")
    random(rae.RAE, **RAE).save_pretrained(folder / "rae")
    return folder


pytestmark = pytest.mark.usefixtures("loaded_once")


def command(folder, out, *options):
    argv = ["sample", "--model", folder / "model", "--autoencoder", folder / "rae"]
    argv += ["--num-points", 4, "--num-samples", COUNT, "--batch-size", 2]
    argv += ["--seed", 3]
    return [*argv, "--out", out, *options]


def sample(folder, out, *options):
    assert run(*command(folder, out, *options)) == 0
    return arrays(out) if out.is_file() and out.suffix == ".npz" else None


def arrays(path):
    with np.load(path) as data:
        return {name: data[name] for name in data.files}


def interrupted(monkeypatch, after):
    """From now on chains are killed after some batches."""
    batches = chains.Chain.batches

    def killed(self, *args, **options):
        for count, drawn in enumerate(batches(self, *args, **options)):
            if count == after:
                raise KeyboardInterrupt
            yield drawn

    monkeypatch.setattr(chains.Chain, "batches", killed)


# ---- Independence


def on(mesh, load, *sources, **options):
    """The same chain on other devices."""
    loaded = load(*sources, **options)
    params = sharding.place(jax.device_get(loaded.params), mesh)
    return dataclasses.replace(loaded, mesh=mesh, params=params)


def test_samples_depend_on_neither_batches_nor_devices(folder, tmp_path, monkeypatch):
    """A stochastic sampler too; pixels within one level, latents to rounding."""
    options = ("--sampler", "euler_maruyama", "--latents")
    load, found = generation.load_converted, []
    for batch_size, devices in ((1, 1), (3, 1), (3, 8)):
        if devices > 1:
            mesh = sharding.Mesh(np.asarray(jax.devices()[:devices]), ("data",))
            patched = functools.partial(on, mesh, load)
            monkeypatch.setattr(generation, "load_converted", patched)
        z, out = (tmp_path / f"{kind}_{batch_size}_{devices}.npz" for kind in "za")
        images = sample(folder, out, "--batch-size", batch_size, *options, z)
        found.append((images, arrays(z)))
    (images, z), *others = found
    assert images["arr_0"].std() > 10 and (np.diff(images["labels"]) != 0).any()
    for other, other_z in others:
        np.testing.assert_array_equal(other["labels"], images["labels"])
        largest = np.abs(z["latents"]).max()
        np.testing.assert_allclose(
            other_z["latents"], z["latents"], atol=1e-5 * largest
        )
        difference = other["arr_0"].astype(int) - images["arr_0"]
        assert np.abs(difference).max() <= 1


def test_keys_of_steps_are_not_those_of_the_noise():
    index = np.arange(50)
    keys = jax.random.key_data(generate.sample_keys(3, index))
    np.testing.assert_array_equal(
        jax.random.key_data(generate.sample_keys(3, index[7:9])), keys[7:9]
    )
    start = jax.random.key(3)
    noise = jax.vmap(lambda i: jax.random.fold_in(start, i))(index)
    other = generate.sample_keys(4, index)
    all_keys = [keys, jax.random.key_data(noise), jax.random.key_data(other)]
    assert len(np.unique(np.concatenate(all_keys), axis=0)) == 150


# ---- Outputs


def test_an_interrupted_archive_goes_on(folder, tmp_path, monkeypatch, capsys):
    """Killed twice, the last time within a row; equal to the other byte for byte."""
    whole, parts = tmp_path / "whole.npz", tmp_path / "new" / "parts.npz"
    sample(folder, whole, "--latents", tmp_path / "whole_z.npz")
    z = tmp_path / "parts_z.npz"
    argv = command(folder, parts, "--latents", z)
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupted(patch, after=1)
            assert run(*argv) == 130
        assert not parts.exists() and not z.exists()
    (partial,) = tmp_path.glob(".parts_z.npz.partial")
    with (partial / "rows.npy").open("ab") as file:
        file.write(b"torn")
    said = fails(capsys, *argv, "--seed", 4)
    assert "seed: 3 -> 4" in said and "parts.npz was begun" in said
    said = fails(capsys, *argv, "--guidance-scale", 1.5)
    assert "guidance_scale: 1.0 -> 1.5" in said
    said = fails(capsys, *argv, "--sampler", "midpoint")
    assert "sampler.name: 'euler' -> 'midpoint'" in said
    assert run(*argv) == 0
    assert "4 were there" in capsys.readouterr().out
    assert parts.read_bytes() == whole.read_bytes()
    assert z.read_bytes() == (tmp_path / "whole_z.npz").read_bytes()
    assert not list(tmp_path.rglob(".*"))

    changed = parts.stat().st_mtime_ns
    assert run(*argv) == 0  # Nothing is left to do.
    assert "6 were there" in capsys.readouterr().out
    assert parts.stat().st_mtime_ns == changed
    sample(folder, parts, "--seed", 5)  # A finished one can be replaced.
    assert (arrays(parts)["arr_0"] != arrays(whole)["arr_0"]).mean() > 0.5


def test_other_weights_do_not_continue_an_archive(
    folder, tmp_path, monkeypatch, capsys
):
    argv = command(folder, tmp_path / "a.npz")
    with monkeypatch.context() as patch:
        interrupted(patch, after=1)
        assert run(*argv) == 130
    load = generation.load_converted

    def trained_further(*sources, **options):
        loaded = load(*sources, **options)
        dit = jax.tree.map(lambda x: x * 1.001, loaded.params["dit"])
        return dataclasses.replace(loaded, params=loaded.params | {"dit": dit})

    monkeypatch.setattr(generation, "load_converted", trained_further)
    said = fails(capsys, *argv)
    assert "weights.dit: '" in said and "weights.autoencoder" not in said


def test_a_folder_keeps_what_it_has(folder, tmp_path, capsys):
    out = tmp_path / "images"
    sample(folder, out)
    files = sorted(path.name for path in out.glob("*.png"))
    assert files == [f"{i:06d}.png" for i in range(COUNT)]
    pixels = np.stack([np.asarray(Image.open(out / name)) for name in files])
    packed = sample(folder, tmp_path / "a.npz")
    np.testing.assert_array_equal(pixels, packed["arr_0"])
    classes = json.loads((out / writing.LABELS_NAME).read_text())
    assert list(classes.values()) == packed["labels"].tolist()

    Image.new("RGB", (16, 16)).save(out / files[0])  # Not made again.
    (out / files[4]).unlink()
    capsys.readouterr()
    sample(folder, out)
    assert "5 were there" in capsys.readouterr().out
    assert not np.asarray(Image.open(out / files[0])).any()
    again = np.asarray(Image.open(out / files[4])).astype(int)
    assert np.abs(again - pixels[4]).max() <= 1
    said = fails(capsys, *command(folder, out, "--label-mode", "random"))
    assert "label_mode: 'balanced' -> 'random'" in said
    (out / ".settings.json").unlink()
    said = fails(capsys, *command(folder, out))
    assert "no record of what made it" in said


def test_latents_as_evaluate_reads_them(folder, tmp_path):
    """Decoded again, they are the images."""
    z, out = tmp_path / "z.npz", tmp_path / "a.npz"
    images = sample(folder, out, "--latents", z)["arr_0"]
    run_ = decoder_scores._Run(folder / "rae", decoder_scores.Options(batch_size=8))
    rows = decoder_scores._open_latents(z, run_.loaded.config)
    stats = decoder_scores._latent_stats(z, "", run_.loaded.config, folder)
    found = np.concatenate(list(decoder_scores._decoded(run_, rows, stats)))
    assert rows.dtype == np.float32 and len(found) == COUNT
    assert np.abs(found.astype(int) - images).max() <= 1
    assert (arrays(z)["labels"] == arrays(out)["labels"]).all()


def test_statistics_of_every_layout():
    """What `rae.denormalize` makes of them is what the autoencoder does."""
    z = np.random.default_rng(1).normal(size=(2, 4, 4, 64)).astype(np.float32)
    for changes in (
        {},
        dict(eps=0.0),
        dict(normalization="deviation", scaling_factor=0.5),
    ):
        model = networks.drawn(rae.RAE, **RAE, **changes)
        raw = rae.denormalize(z, generation.statistics(model))
        expected = model.latent_mean[...][None] + model._scale()[None] * (
            z / model.scaling_factor
        )
        np.testing.assert_allclose(raw, expected, rtol=1e-5, atol=1e-5)


# ---- Options


def test_a_sweep_over_scales_and_other_samplers(folder, tmp_path):
    """One output per scale, each as made alone; every sampler gives other images."""
    sweep = ("--guidance-scale", "1,1.5", "--latents", tmp_path / "z.npz")
    sample(folder, tmp_path / "a.npz", *sweep)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a_1.npz", "a_1.5.npz", "z_1.npz", "z_1.5.npz"}
    plain, guided = (arrays(tmp_path / f"a_{s}.npz")["arr_0"] for s in ("1", "1.5"))
    alone = sample(folder, tmp_path / "b.npz", "--guidance-scale", "1.5")["arr_0"]
    np.testing.assert_array_equal(alone, guided)
    assert (guided != plain).mean() > 0.3
    shared = ("--sampler", "euler_shared", "--guidance-scale", "1.5")
    shared += ("--sampler-option", "period=3")
    found = sample(folder, tmp_path / "c.npz", *shared)["arr_0"].astype(int)
    assert np.abs(found - guided).max() > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(samplers.SAMPLERS) - {"euler"}))
def test_every_sampler_guided_and_not(folder, tmp_path, name):
    options = ("--guidance-scale", "1,1.5", "--final-zero", "--sampler", name)
    sample(folder, tmp_path / "a.npz", *options)
    plain, guided = (arrays(tmp_path / f"a_{s}.npz")["arr_0"] for s in ("1", "1.5"))
    assert (guided != plain).mean() > 0.3


def test_mistakes_are_named(folder, tmp_path, capsys):
    sizes = dict(hidden_size=32, depth=1, num_heads=2)
    random(dit.DiT, **DIT_DH | sizes).save_pretrained(tmp_path / "dit")
    out = tmp_path / "out" / "a.npz"

    def error(*options):
        return fails(capsys, *command(folder, out, *options))

    assert "'dopri5', 'euler'" in error("--sampler", "ddim")
    heun = ("--sampler", "heun", "--sampler-option")
    assert "no options ['rtol']" in error(*heun, "rtol=1")
    shared = ("--sampler", "euler_shared", "--sampler-option")
    assert "'period=often'" in error(*shared, "period=often")
    for text in ("period", "period=", "1", "period=1) or (2", "**{}"):
        assert "give each one once" in error(*shared, text)
    assert "each one once" in error(*shared, "period=2", shared[2], "period=3")
    said = error("--sampler", "euler_shared", "--model", tmp_path / "dit")
    assert "DiT has no trunk" in said
    for scale in ("1,", "x", "nan", "1,1.0"):
        assert "--guidance-scale" in error("--guidance-scale", scale)
    assert "low and high" in error("--guidance-interval", "0.5,0.2")
    assert "to an .npz file" in error("--latents", tmp_path / "z")
    assert "Unknown class 'tench'" in error("--labels", "tench")
    assert not out.parent.exists()


def test_samples_that_are_not_finite_are_an_error(
    folder, tmp_path, monkeypatch, capsys
):
    """They would become black. One number too large in one sample, too."""
    out, load = tmp_path / "out" / "a.npz", generation.load_converted

    def damaged(*sources, **options):
        loaded = load(*sources, **options)
        dit = jax.tree.map(lambda x: x * np.nan, loaded.params["dit"])
        return dataclasses.replace(loaded, params=loaded.params | {"dit": dit})

    monkeypatch.setattr(generation, "load_converted", damaged)
    said = fails(capsys, *command(folder, out, "--labels", "7"))
    assert "Not finite: sample 0 (class 7), 1 (class 7)." in said
    assert not out.parent.exists()

    def overflowing(index, labels):
        return generate.Drawn(index, index, None, index != 4)

    rows = sharding.batch_sharding(sharding.make_mesh(1))
    labels = np.arange(10, 16)
    parts = generate.draw(overflowing, labels, 3, rows)
    assert next(parts).index.tolist() == [0, 1, 2]
    with pytest.raises(FloatingPointError, match=r"sample 4 \(class 14\)\."):
        next(parts)


def test_label_modes():
    from rae_jax.commands import sample as verb

    names = tuple("abcdefghij")
    balanced = verb.choose_labels(None, names, 30, 0, "balanced")
    np.testing.assert_array_equal(np.bincount(balanced), 3)
    drawn = verb.choose_labels(None, names, 10_000, 0, "random")
    counts = np.bincount(drawn, minlength=10)
    assert 880 < counts.min() < counts.max() < 1120 and drawn.dtype == np.int32
    named = verb.choose_labels("b, 7", names, 1000, 0, "random")
    assert set(named) == {1, 7} and 430 < (named == 1).sum() < 570


# ---- Configs


def test_configs_of_older_runs_have_defaults():
    config = chain.load("latent_diffusion")
    old = dict(num_points=7, final_zero=True, guidance_scale=2.0)
    with config.unlocked():
        config.sampling = old | dict(guidance_interval=(0.0, 0.5))
    plan = sampling.plan_of(config)
    assert plan.sampler.name == "euler" and plan.guidance == "cfg"
    assert len(plan.sampler.times) == 8 and plan.sampler.times[-1] == 0
    assert registry.design(config).num_steps == config.num_steps
    assert sampling.complete(config.sampling).guidance_scale == 2
    assert set(sampling.DEFAULTS) == set(chain.load("latent_diffusion").sampling)


def test_the_sampler_of_a_config():
    config = chain.load(
        "latent_diffusion",
        "sampling.name=euler_maruyama",
        "sampling.options=diffusion=constant, strength=0.5",
        "sampling.times=(1.0, 0.5, 0.1)",
    )
    sampler = sampling.plan_of(config).sampler
    expected = dict(diffusion="constant", strength=0.5)
    assert sampler.options == expected and sampler.stochastic
    np.testing.assert_array_equal(sampler.times, np.float32([1, 0.5, 0.1]))
    assert sampling.parse_options("steps=(0, 2), rtol=1e-4") == {
        "steps": (0, 2),
        "rtol": 1e-4,
    }
    assert sampling.parse_options("") == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=eular"], "Unknown sampler 'eular'"),
        (["name=heun", "num_points=1"], "at least 2"),
        (["times=(0.1, 0.5)"], "fall within"),
        (["name=dopri5", "options=rtol=0.0"], "must be positive"),
        (["guidance=autoguide"], "Did you mean 'autoguidance'"),
        (["guidance=autoguidance"], "needs sampling.guide"),
        (["guide=../small"], "goes with sampling.guidance = 'autoguidance'"),
        (["guidance_interval=(0.5, 0.2)"], "low and high"),
        (["guidance_interval=(0.5,)"], "low and high"),
    ],
)
def test_mistakes_in_a_config_stop_a_run_before_it_starts(overrides, message):
    overrides = [f"sampling.{text}" for text in overrides]
    config = chain.load("latent_diffusion", *overrides)
    with pytest.raises(ValueError, match=message):
        registry.design(config)


def test_sharing_needs_a_trunk():
    config = chain.load("latent_diffusion", "sampling.name=euler_shared")
    registry.design(config)
    config.network = "dit"
    with pytest.raises(configs.ConfigError, match="DiT has no trunk and head"):
        registry.design(config)
    assert samplers.make_sampler("euler_shared").shares_trunk
