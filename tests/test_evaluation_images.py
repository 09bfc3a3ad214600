"""`rae-jax evaluate` on samples and images, and the networks that judge them."""

import functools
import json
from types import SimpleNamespace

import chain
import image_sets
import jax
import numpy as np
import pytest
import seeded
import tiny_encoders
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from rae_jax import config as configs
from rae_jax import main
from rae_jax.commands import evaluate
from rae_jax.evaluation import features, inception_features, pictures, quality
from rae_jax.models import encoders, vit_encoder
from rae_jax.trainers import generation, inputs, judges, scores
from rae_jax.training import sharding

SIDE = 32


@pytest.fixture
def cheap_networks(monkeypatch):
    """Weight files are not read."""

    def inception(path, *, batch_size, mesh=None):
        return image_sets.network(batch_size)

    def efflite0(batch_size, *, mesh=None):
        return image_sets.network(batch_size, 1, features.EFFLITE0)

    monkeypatch.setattr(inception_features, "make_extractor", inception)
    monkeypatch.setattr(features, "make_efflite0", efflite0)


def run(capsys, *arguments):
    """Returns the exit status and all that the command printed."""
    status = main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


# Generated images.


class FakeGenerator:
    """Images that are a function of seed, index, label and scale."""

    num_classes = 3

    def __init__(self, offset=0):
        self.config = chain.load("latent_diffusion")
        self.plan = SimpleNamespace(num_states=5)
        self.offset = offset

    def untrained(self):
        return FakeGenerator(offset=90)

    def images(self, labels, *, scale, seed, batch_size):
        for start in range(0, len(labels), batch_size):
            index = range(start, min(start + batch_size, len(labels)))
            rngs = [np.random.default_rng([seed, i, labels[i]]) for i in index]
            parts = [r.integers(0, 150, (SIDE, SIDE, 3)) for r in rngs]
            yield (np.stack(parts) + self.offset + 9 * scale).astype(np.uint8)

    def states(self, labels, keep, *, scale, seed):
        return np.zeros((len(keep), len(labels), SIDE, SIDE, 3), np.float32)


@pytest.fixture
def fake_generator(monkeypatch, cheap_networks):
    monkeypatch.setattr(generation, "load", lambda workdir: FakeGenerator())


def test_generation_quality(fake_generator, tmp_path):
    labels = scores.generate.balanced_labels(20, 3, 5)
    samples = np.concatenate(
        list(FakeGenerator().images(labels, scale=2.0, seed=5, batch_size=20))
    )
    reference = np.random.default_rng(0).integers(0, 200, (30, SIDE, SIDE, 3))
    np.savez(tmp_path / "ref.npz", arr_0=reference.astype(np.uint8))
    np.savez(tmp_path / "samples.npz", arr_0=samples)
    expected = None
    for batch_size in (3, 20):
        given = judges.Judges("given", False, "", str(tmp_path / "ref.npz"), batch_size)
        arguments = dict(num_samples=20, seed=5, scale=2.0)
        found = scores.generation_quality(tmp_path, given, **arguments).scores
        images = judges.compare_images(tmp_path / "samples.npz", given).scores
        assert found.pop("gfid_20") == pytest.approx(images.pop("fid_20"), rel=1e-6)
        assert found.pop("num_samples") == images.pop("num_images") == 20
        assert found.pop("guidance_scale") == 2.0
        assert found == pytest.approx(images, rel=1e-5)
        assert expected is None or found == pytest.approx(expected, rel=1e-5)
        expected = found
    with pytest.raises(ValueError, match="--reference"):
        scores.generation_quality(tmp_path, judges.Judges("given"), **arguments)
    with pytest.raises(ValueError, match="weights-inception"):
        scores.generation_quality(tmp_path, judges.Judges(), **arguments)


def test_generation_scores_of_efflite0(fake_generator, tmp_path):
    """Streamed; the real images are split as they were when held in memory."""
    counts, sizes = [], dict(num_samples=10, num_reference=40, batch_size=8)
    result = scores.generation_scores(
        tmp_path, **sizes, seed=0, scale=2.0, progress=counts.append
    )
    found = result.scores
    assert counts == [8, 2] * 3  # Samples, not real images.
    assert "The set has 10 images, fewer than 10000" in result.notes[0]
    generator, net = FakeGenerator(), image_sets.network(8, 1, features.EFFLITE0)
    data = generator.config.data
    with inputs.eval_batches(data, data.split, limit=50) as batches:
        real = np.concatenate([b["image"][b["mask"] > 0] for b in batches])
    order = np.random.default_rng(0).permutation(50)
    labels = scores.generate.balanced_labels(10, 3, 0)
    arguments = dict(seed=0, batch_size=10)
    sets = {
        "real_train": [real[order[:10]]],
        "samples": generator.images(labels, scale=1.0, **arguments),
        "guided": generator.images(labels, scale=2.0, **arguments),
        "untrained": generator.untrained().images(labels, scale=1.0, **arguments),
    }
    reference = quality.measure(net, [real[order[10:]]], "real")
    for name, batches in sets.items():
        measured = quality.measure(net, batches, name)
        expected = quality.compare(measured, reference).scores["fd_efflite0"]
        assert found[f"fd_efflite0_{name}"] == pytest.approx(expected, rel=1e-5)
    assert found["num_samples"] == 10 and found["num_reference"] == 40
    for name in ("samples.png", "samples_guided.png", "strip.png"):
        assert (tmp_path / name).is_file()
    with pytest.raises(ValueError, match="lower --num-samples to at most 512"):
        scores.generation_scores(
            tmp_path, num_samples=600, num_reference=1000, batch_size=8, seed=0
        )


def test_evaluation_of_a_run_without_weights(
    fake_generator, capsys, monkeypatch, tmp_path
):
    """fd_efflite0, what FID needs, and how little so few samples say."""
    configs.save_config(chain.load("latent_diffusion"), tmp_path / "config.json")
    monkeypatch.setattr(evaluate, "LINE_SECONDS", 0.0)
    few = ("--num-samples", 10, "--num-reference", 40, "--batch-size", 8)
    status, text = run(capsys, "evaluate", tmp_path, *few)
    assert status == 0, text
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"fd_efflite0_samples", "fd_efflite0_real_train"} <= set(found)
    assert "The set has 10 images, fewer than 10000" in text
    assert "gFID, which was not measured" in text and "--reference REF.npz" in text
    for url in inception_features.URLS:
        assert url in text
    assert "20 images measured (" in text and " images/s)" in text
    given = ("--reference", tmp_path / "ref.npz")
    status, text = run(capsys, "evaluate", tmp_path, *few, *given)
    assert status == 1 and "--efflite0 measures fd_efflite0" in text
    assert inception_features.URLS[0] in text


# Images without a run.


def write_images(folder, count, seed, offset=0):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 200, (count, SIDE, SIDE, 3)) + offset
    for i, image in enumerate(pixels.astype(np.uint8)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return pixels.astype(np.uint8)


def test_evaluation_of_images(capsys, cheap_networks, tmp_path):
    write_images(tmp_path / "real", 30, 0)
    samples = write_images(tmp_path / "samples", 20, 1, offset=20)
    np.savez(tmp_path / "samples.npz", arr_0=samples)
    ref, out = tmp_path / "ref.npz", tmp_path / "scores.json"
    make = ("evaluate", tmp_path / "real", "--inception", "given")
    status, text = run(capsys, *make, "--save-statistics", ref)
    assert status == 0, text
    found = []
    for images in ("samples", "samples.npz"):
        status, text = run(
            *(capsys, "evaluate", tmp_path / images, "--inception", "given"),
            *("--reference", ref, "--out", out),
        )
        assert status == 0, text
        assert "Note: The set has 20 images, fewer than 10000" in text
        assert "Note: The reference has 30 images" in text
        found.append(json.loads(out.read_text()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert set(found[0]) == {
        *("fid_20", "sfid_20", "inception_score", "inception_score_std"),
        "num_images",
    }
    assert found[0]["num_images"] == 20 and found[0]["fid_20"] > 0
    both = ("--efflite0", "--inception", "given", "--reference", tmp_path / "real")
    status, text = run(
        capsys, "evaluate", tmp_path / "samples", *both, "--limit", 10, "--out", out
    )
    assert status == 0, text
    found = json.loads(out.read_text())
    assert {"fd_efflite0", "fid_10", "precision", "recall"} <= set(found)
    # The same features under two names.
    assert found["fd_efflite0"] == pytest.approx(found["fid_10"], rel=1e-6)


def test_commands_say_what_is_missing(capsys, cheap_networks, tmp_path):
    write_images(tmp_path / "real", 3, 0)

    def error(*arguments):
        status, text = run(capsys, "evaluate", *arguments)
        assert status == 1
        return text

    text = error(tmp_path / "real")
    for url in inception_features.URLS:
        assert url.rpartition("/")[2] in text
    assert "--efflite0" in text and "fd_efflite0" in text
    text = error(tmp_path / "real", "--inception", "given")
    assert "--reference REF.npz" in text and "--save-statistics" in text
    out = tmp_path / "s.npz"
    folder = tmp_path / "run"
    configs.save_config(chain.load("probe"), folder / "config.json")
    assert "not for runs" in error(folder, "--save-statistics", out)
    assert "is not the workdir" in error(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "is not the workdir" in error(tmp_path / "empty")
    text = error(tmp_path / "empty", "--inception", "given", "--reference", "x")
    assert "empty holds no images" in text


# Networks.


@pytest.fixture
def inception_file(tmp_path):
    """A file with seeded weights under the official names."""
    with np.load(chain.ROOT / "tests" / "golden" / "inception.npz") as golden:
        shapes = json.loads(str(golden["shapes"]))
    arrays = {name: seeded.weight(name, tuple(s)) for name, s in shapes.items()}
    np.savez(tmp_path / "inception.npz", **arrays)
    return tmp_path / "inception.npz"


def test_inception_from_a_weight_file(inception_file):
    """Pooled features, spatial ones and logits of torch-fidelity."""
    mesh = sharding.make_mesh(1)
    net = inception_features.make_extractor(inception_file, batch_size=1, mesh=mesh)
    found = jax.device_get(net(seeded.image(40, 64)))
    with np.load(chain.ROOT / "tests" / "golden" / "inception.npz") as golden:
        names = {"pool": "pool", "spatial": "spatial", "logits": "logits_unbiased"}
        for name, key in names.items():
            expected = golden[f"40x64/{key}"]
            error = np.abs(found[name] - expected).max() / np.abs(expected).max()
            assert error < 1e-5


def test_inception_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth"):
        inception_features.load(tmp_path / "gone.pth")
    path = tmp_path / "other.npz"
    np.savez(path, weight=np.zeros(3))
    with pytest.raises(ValueError, match=r"missing: Conv2d_1a_3x3\.conv\.weight"):
        inception_features.load(path)


def test_distances_in_an_encoder(tmp_path, capsys):
    """The mean of its patch tokens or the class token, after the affine norm."""
    sizes = dict(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        depth=1,
        num_heads=2,
        intermediate_size=32,
        normalize=False,
    )
    make = nnx.jit(lambda: vit_encoder.ViTEncoder("dinov2", **sizes, rngs=nnx.Rngs(0)))
    encoder = make()
    encoder.norm.scale[...] = 2.0 * encoder.norm.scale[...]
    encoder.save_pretrained(tmp_path / "encoder")
    net = features.make_encoder(tmp_path / "encoder", batch_size=8)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    mean, std = (
        np.asarray(x, np.float32) for x in (encoder.image_mean, encoder.image_std)
    )
    tokens = nnx.jit(lambda encoder, x: encoder(x))(
        encoder, (images / np.float32(255) - mean) / std
    )
    assert net.name == "fd_dinov2_mean"
    np.testing.assert_allclose(net(images)["pool"], tokens.mean(axis=1), atol=1e-5)
    command = ("evaluate", tmp_path / "a", "--reference", tmp_path / "b")
    command += ("--encoder", tmp_path / "encoder", "--encoder-token", "cls")
    sets = [write_images(tmp_path / name, 4, i) for i, name in enumerate("ab")]
    status, text = run(capsys, *command, "--out", tmp_path / "scores.json")
    assert status == 0, text
    make = ("evaluate", tmp_path / "b", *command[4:])
    status, text = run(capsys, *make, "--save-statistics", tmp_path / "b.npz")
    assert status == 0, text
    net = features.make_encoder(tmp_path / "encoder", token="cls", batch_size=8)
    found = json.loads((tmp_path / "scores.json").read_text())["fd_dinov2_cls"]
    a, b = (quality.measure(net, [x], "images") for x in sets)
    assert found == pytest.approx(quality.compare(a, b).scores["fd_dinov2_cls"])
    b = quality.read_reference(net, tmp_path / "b.npz")
    assert found == pytest.approx(quality.compare(a, b).scores["fd_dinov2_cls"])
    status, text = run(capsys, *make, "--efflite0", "--save-statistics", "x.npz")
    assert status == 1 and "a file holds those of one network" in text
    # The class token of the same network: at its size, of the same pixels.
    x = jax.device_get(net(images)["pool"])
    expected = nnx.jit(lambda encoder, x: encoder.class_token(x))(
        encoder, (images / np.float32(255) - mean) / std
    )
    np.testing.assert_allclose(x, expected, atol=1e-5)
    assert np.abs(x - tokens.mean(axis=1)).max() > 0.1


def test_only_the_published_encoder_has_the_published_name():
    def shapes(preset, **changes):
        block = encoders.PRESETS[preset]
        sizes = block["sizes"] | changes
        make = functools.partial(encoders.make_encoder, block["name"], **sizes)
        return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))

    large = shapes("dinov2_noreg_l")
    assert features.distance_name(large, "cls") == "fd_dinov2"
    assert features.distance_name(large, "mean") == "fd_dinov2_mean"
    for encoder, family in (
        (shapes("dinov2_l"), "dinov2_with_registers"),
        (shapes("dinov2_noreg_b"), "dinov2"),
        (shapes("dinov2_noreg_l", image_size=518), "dinov2"),
    ):
        assert features.distance_name(encoder, "cls") == f"fd_{family}_cls"


def test_encoders_that_a_config_names(tmp_path):
    """While training; by a path from the workdir, or a hub id."""
    (tmp_path / "encoder").mkdir()
    config = chain.load("rae_decoder", "evaluation.encoder_token=cls")
    for source, path in (
        ("../encoder", str(tmp_path / "encoder")),
        ("facebook/dinov2-large", "facebook/dinov2-large"),
    ):
        config.evaluation.encoder = source
        found = judges.configured(config, tmp_path / "run")
        assert (found.encoder, found.encoder_token) == (path, "cls")
    older = ConfigDict(dict(evaluation=dict(encoder="x")))
    assert judges.configured(older, tmp_path).encoder_token == "mean"


def test_tokens_that_there_are_not(tmp_path):
    with pytest.raises(configs.ConfigError, match="encoder token 'class'.*'cls'"):
        features.make_encoder(tmp_path, token="class")
    tiny_encoders.make("siglip", normalize=False).save_pretrained(tmp_path)
    with pytest.raises(configs.ConfigError, match="'siglip' have no class token"):
        features.make_encoder(tmp_path, token="cls")


# Pictures.


def test_error_maps_have_a_fixed_scale():
    images = np.full((3, 4, 5, 3), 0.5, np.float32)
    recon = images + np.array([0.0, 0.5, 0.4], np.float32)[:, None, None, None]
    recon[2, :2] = 0.5
    found = pictures.error_map(images, recon)
    assert found.shape == images.shape and found.dtype == np.uint8
    assert found[0].max() <= 4  # No error is black.
    np.testing.assert_array_equal(
        found[1], found[2, 3, 0][None, None].repeat(4, 0).repeat(5, 1)
    )
    np.testing.assert_array_equal(found[2, :2], found[0, :2])
    half = pictures.error_map(images, recon, limit=1.0)
    assert 0 < half[1].mean() < found[1].mean()
    with pytest.raises(ValueError, match="Shapes differ"):
        pictures.error_map(images, recon[:1])
