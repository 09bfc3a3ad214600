"""Weights of runs exported, and sampling and reconstructing with converted weights."""

import json

import chain
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from rae_jax import config as configs
from rae_jax import main
from rae_jax.convert import published, sources, stats_files
from rae_jax.diffusion import guidance, samplers, schedules
from rae_jax.evaluation import generate, reconstruction
from rae_jax.models import decoder, dit_dh, ldae_encoder, pretrained, rae
from rae_jax.trainers import autoencoder, frozen, generation, weights
from rae_jax.training import checkpoints, state

RAE = dict(
    encoder=networks.network("ViTEncoder", networks.ENCODER),
    decoder=networks.network("RAEDecoder", networks.DECODER),
    latent_shape=(4, 4, 64),
)
DIT_DH = dict(
    input_size=4,
    in_channels=64,
    hidden_size=(32, 48),
    depth=(1, 1),
    num_heads=(2, 2),
    num_classes=10,
)
GUIDE = DIT_DH | dict(hidden_size=(16, 32))
LABELS = np.array([1, 7, 1, 7, 1], np.int32)
POINTS = 6


def random(cls, **arguments):
    """Returns a network whose output varies as its input does."""
    network = pretrained.Skeleton(cls, arguments)
    rng = np.random.default_rng(0)

    def value(name, shape):
        draw = rng.normal(size=shape).astype(np.float32)
        if name.endswith(("scale", "scale1", "scale2", "latent_var")):
            return 1 + 0.1 * draw
        return draw / np.float32(np.sqrt(shape[-2]) if len(shape) > 1 else 10)

    items = ((name, value(name, shape)) for name, shape in network.shapes.items())
    return network.filled(items, (), "random")


def run(*argv):
    return main.main([str(word) for word in argv])


def fails(capsys, *argv):
    capsys.readouterr()
    assert run(*argv) == 1
    return capsys.readouterr().err


def assert_params(path, params):
    """A file in our layout holds exactly these parameters."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    names = {".".join(str(key.key) for key in path): x for path, x in flat}
    source = sources.open_tensors(path)
    assert set(source.shapes) == set(names)
    for name, value in names.items():
        np.testing.assert_array_equal(source.read(name), value)


# Runs


def test_a_diffusion_run_becomes_official(runs, tmp_path):
    """EMA weights or the trained ones, through the official layout and back."""
    workdir = runs / "latent_diffusion"
    for part, key in (("ema", "ema_params"), ("model", "params")):
        file = tmp_path / f"{part}.pt"
        assert run("convert", workdir, file, "--part", part) == 0
        assert run("convert", file, tmp_path / part) == 0
        stored = checkpoints.load_params(workdir, (key,))
        ours = sources.open_tensors(tmp_path / part)
        read = ours.read("head_blocks.block.attn.qkv.kernel")
        expected = stored["head_blocks"]["block"]["attn"]["qkv"]["kernel"]
        np.testing.assert_array_equal(read, expected)
    assert_params(*_without_extras(tmp_path / "model", stored, tmp_path))
    assert dit_dh.DiTDH.from_pretrained(tmp_path / "ema").num_classes == 10
    sampling = generation.load(workdir, num_points=3).config.sampling
    assert sampling.num_points == 3 and sampling.guidance_scale == 1


def _without_extras(folder, params, tmp_path):
    source = sources.open_tensors(folder)
    names = [name for name in source.shapes if not name.startswith("extra.")]
    assert len(names) < len(source.shapes)
    arrays = {name: source.read(name) for name in names}
    return networks.write_pt(tmp_path / "bare.pt", arrays), params


def test_other_runs(runs, tmp_path, capsys):
    decoder_run = runs / "rae_decoder"
    assert run("convert", decoder_run, tmp_path / "decoder") == 0
    assert_params(tmp_path / "decoder", checkpoints.load_params(decoder_run))
    decoder.RAEDecoder.from_pretrained(tmp_path / "decoder")
    assert run("convert", runs / "latent_stats", tmp_path / "stat.pt") == 0
    found = stats_files.read_stats(tmp_path / "stat.pt")
    with np.load(runs / "latent_stats" / frozen.STATS_NAME) as stored:
        np.testing.assert_array_equal(found.mean, stored["mean"])
        np.testing.assert_array_equal(found.var, stored["var"])
    assert run("convert", runs / "ldae", tmp_path / "ldae") == 0
    settings = pretrained.read_config(tmp_path / "ldae")
    assert settings["class"] == ldae_encoder.LDAEEncoder.__name__

    new = tmp_path / "new"
    said = fails(capsys, "convert", runs / "probe", new)
    assert "'probe' have no weights to convert" in said
    said = fails(capsys, "convert", decoder_run, new, "--kind", "dit")
    assert "gives decoder or autoencoder, not dit" in said
    said = fails(capsys, "convert", decoder_run, new, "--set", "num_heads=3")
    assert "num_heads cannot be set" in said
    assert "'ema'" in fails(capsys, "convert", decoder_run, new, "--part", "emma")
    assert not new.exists()


def test_the_autoencoder_of_a_run(runs, tmp_path):
    """Its encoder, decoder and statistics; images as the run itself has them."""
    argv = ["--kind", "autoencoder", "--set", f"latent_stats={runs / 'latent_stats'}"]
    assert run("convert", runs / "rae_decoder", tmp_path / "rae", *argv) == 0
    model = rae.RAE.from_pretrained(tmp_path / "rae")
    assert model.eps == 1e-5
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    pictures = []
    for option, source in (
        ("--workdir", runs / "rae_decoder"),
        ("--autoencoder", runs / "rae_decoder"),
        ("--autoencoder", tmp_path / "rae"),
    ):
        out = tmp_path / f"{option}_{source.name}"
        assert run("reconstruct", tmp_path / "a.png", option, source, "--out", out) == 0
        pictures.append(np.asarray(Image.open(out / "a_png.png")).astype(int))
    for picture in pictures[1:]:
        assert np.abs(picture - pictures[0]).max() <= 1  # Truncated to 8 bits.


# Converted weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Official files of a network and its guide; a folder of an autoencoder."""
    folder = tmp_path_factory.mktemp("converted")
    for name, arguments in (("model", DIT_DH), ("guide", GUIDE)):
        network = random(dit_dh.DiTDH, **arguments)
        network.save_pretrained(folder / name, layout="official")
    random(rae.RAE, **RAE).save_pretrained(folder / "rae")
    return folder


def expected_samples(folder, make_velocity):
    """Samples computed with the networks themselves."""
    model, guide = (
        dit_dh.DiTDH.from_pretrained(folder / name) for name in ("model", "guide")
    )
    times = samplers.euler_times(POINTS, schedules.dimension_shift(4 * 4 * 64))

    @jax.jit
    def images(model, guide, autoencoder):
        eps = generate.sample_noise(3, jnp.arange(len(LABELS)), (4, 4, 64))
        velocity = make_velocity(model, guide)
        z = samplers.sample_euler(velocity, eps, jnp.asarray(LABELS), times)
        return reconstruction.to_uint8(autoencoder.decode(z))

    return np.asarray(images(model, guide, rae.RAE.from_pretrained(folder / "rae")))


def sample(folder, out, *options):
    argv = ["--model", folder / "model", "--autoencoder", folder / "rae"]
    argv += ["--num-points", POINTS, "--labels", "1,7", "--num-samples", len(LABELS)]
    assert run("sample", *argv, "--seed", 3, "--out", out, *options) == 0
    with np.load(out) as data:
        assert data["labels"].tolist() == LABELS.tolist()
        return data["arr_0"].astype(int)


def test_guided_samples(converted, tmp_path):
    """As the networks themselves give, with the times of the official code."""
    auto = ("--guide", converted / "guide", "--guidance-scale", 1.42)
    interval = ("--guidance-interval", "0.2,0.9")
    found = sample(converted, tmp_path / "a.npz", *auto, *interval)
    expected = expected_samples(
        converted,
        lambda model, guide: guidance.autoguidance(model, guide, 1.42, (0.2, 0.9)),
    )
    assert found.shape == (5, 16, 16, 3) and found.std() > 10
    assert np.abs(found - expected).max() <= 1
    free = sample(converted, tmp_path / "b.npz", "--guidance-scale", 2)
    expected = expected_samples(
        converted, lambda model, guide: guidance.classifier_free(model, 2, 10)
    )
    assert np.abs(free - expected).max() <= 1
    assert np.abs(free - found).max() > 5


def test_other_statistics_take_the_place_of_the_own(converted, tmp_path):
    mean = np.random.default_rng(0).random((64, 4, 4), np.float32)
    stats = networks.write_pt(tmp_path / "s.pt", {"mean": mean, "var": mean + 1})
    own = rae.RAE.from_pretrained(converted / "rae")
    model = weights.load_autoencoder(converted / "rae", stats, dtype="bfloat16")
    np.testing.assert_array_equal(model.latent_mean[...], np.moveaxis(mean, 0, -1))
    np.testing.assert_array_equal(model.latent_var[...], np.moveaxis(mean + 1, 0, -1))
    assert model.eps == 1e-5 and own.latent_var[...].std() > 0
    assert model.decoder.embed.dtype == jnp.bfloat16
    other = networks.write_pt(tmp_path / "o.pt", {"var": mean[:3]}, mean=None)
    with pytest.raises(ValueError, match=r"\(4, 4, 3\)"):
        weights.load_autoencoder(converted / "rae", other)


def test_reconstructions(converted, tmp_path, capsys):
    """Images are cropped to the size that the decoder makes."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    argv = ["--autoencoder", converted / "rae", "--out", tmp_path / "out"]
    assert run("reconstruct", tmp_path, *argv) == 0
    assert "0.png: PSNR" in capsys.readouterr().out
    model = rae.RAE.from_pretrained(converted / "rae")
    images = jnp.asarray(pixels, jnp.float32) / 255
    recon = networks.decode(model, networks.encode(model, images))
    expected = reconstruction.to_uint8(recon)
    for i in range(2):
        found = np.asarray(Image.open(tmp_path / "out" / f"{i}_png.png"))
        # A gap of 2 pixels all around and between.
        np.testing.assert_array_equal(found[2:18, 2:18], pixels[i])
        right = found[2:18, 20:36].astype(int)
        assert np.abs(right - expected[i]).max() <= 1


def test_evaluation(tmp_path, capsys):
    """The same scores as of the reconstructions made by hand."""
    sizes = networks.DECODER | dict(patch_size=8)
    parts = RAE | dict(decoder=networks.network("RAEDecoder", sizes))
    model = random(rae.RAE, **parts)
    model.save_pretrained(tmp_path / "rae")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    argv = ["evaluate", tmp_path / "rae", "--out", tmp_path / "scores.json"]
    assert "--images" in fails(capsys, *argv)
    assert run(*argv, "--images", tmp_path / "images.npz", "--batch-size", 2) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    z = networks.encode(model, jnp.asarray(images, jnp.float32) / 255)
    recon = reconstruction.to_uint8(networks.decode(model, z))
    psnr = reconstruction.image_scores(jnp.asarray(images), recon)["psnr"]
    np.testing.assert_allclose(found["psnr"], psnr.mean(), atol=1e-3)  # dB
    assert {"ssim", "lpips_vgg", "lpips_alex"} <= found.keys()


def test_networks_that_do_not_go_together(converted, tmp_path, capsys):
    other = networks.drawn(dit_dh.DiTDH, **(GUIDE | dict(in_channels=48)))
    other.save_pretrained(tmp_path / "other")
    fewer = networks.drawn(dit_dh.DiTDH, **(GUIDE | dict(num_classes=9)))
    fewer.save_pretrained(tmp_path / "fewer")
    argv = ["sample", "--out", tmp_path / "a.npz", "--autoencoder", converted / "rae"]
    guided = [*argv, "--model", converted / "model", "--guide"]
    said = fails(capsys, *argv, "--model", tmp_path / "other")
    assert "latents (4, 4, 48)" in said and "(4, 4, 64)" in said
    said = fails(capsys, *guided, tmp_path / "fewer", "--guidance-scale", 2)
    assert "10 classes" in said and "9" in said
    assert "--guidance-scale" in fails(capsys, *guided, converted / "guide")
    said = fails(capsys, *argv, "--model", converted / "rae")
    assert "kind autoencoder" in said
    assert "--model and --autoencoder" in fails(capsys, *argv)
    said = fails(capsys, *argv, tmp_path, "--model", converted / "model")
    assert "not both" in said
    interval = ("--guidance-interval", "0.2")
    assert "two times" in fails(capsys, *argv, "--model", "x", *interval)
    said = fails(capsys, *argv, "--model", "dit-dh-xl-256")
    assert "hf download nyu-visionx/RAE-collections" in said
    assert not list(tmp_path.glob("a.*"))


def test_published_names_are_known(monkeypatch, tmp_path):
    """Each name leads to what it stands for."""
    asked = []

    def located(source, *, allow):
        asked.append(str(source))
        raise FileNotFoundError(source)

    monkeypatch.setattr(weights.hub, "locate", located)
    for name in (*published.SOURCES, *published.AUTOENCODERS):
        with pytest.raises(FileNotFoundError):
            weights.open_source(name)
    assert asked[: len(published.SOURCES)] == list(published.SOURCES.values())
    encoders = [parts.encoder for parts in published.AUTOENCODERS.values()]
    assert asked[len(published.SOURCES) :] == encoders


def test_configs_name_converted_weights(converted, tmp_path):
    """As the decoder of a diffusion run, its statistics and an l-DAE encoder."""
    whole = rae.RAE.from_pretrained(converted / "rae")
    found = autoencoder.find("rae", converted)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 64)), jnp.float32)
    expected = rae.decode(whole.decoder, z, whole.encoder)
    recon = jax.jit(found.decode)(found.params, z)
    np.testing.assert_allclose(recon, expected, atol=1e-6)

    sizes = ConfigDict(dict(image_size=16, patch_size=4, hidden_size=64))
    var = np.random.default_rng(1).uniform(1, 2, (64, 4, 4)).astype(np.float32)
    networks.write_pt(tmp_path / "stat.pt", {"var": var}, mean=None)
    stats = frozen.load_stats("stat.pt", sizes, tmp_path)
    np.testing.assert_array_equal(stats["var"], np.moveaxis(var, 0, -1))
    assert not stats["mean"].any()

    block = chain.encoder("own")
    arguments = block.sizes.to_dict()
    own = networks.drawn(ldae_encoder.LDAEEncoder, **arguments)
    own.save_pretrained(tmp_path / "own")
    params = frozen.load_encoder(block, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, state.param_dict(own))
    with pytest.raises(configs.ConfigError, match="depth = 1, the encoder has 2"):
        frozen.load_encoder(chain.encoder("own", depth=1), tmp_path)
