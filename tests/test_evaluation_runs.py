"""`rae-jax evaluate` on decoders, with a cheap network in Inception's place."""

import json
import types

import chain
import image_sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rae_jax import config as configs
from rae_jax import main
from rae_jax.evaluation import inception_features, reconstruction, robustness
from rae_jax.models import rae
from rae_jax.trainers import (
    autoencoder,
    decoder_scores,
    frozen,
    inputs,
    judges,
    online,
    rae_decoder,
)
from rae_jax.training import checkpoints, sharding

SIDE = 32
NUM_IMAGES = 12  # Of the smoke config's validation split.
# Rounding can move a value over a step of 8 bits, where a pixel changes by 1/255.
LOOSE = 1e-4


@pytest.fixture(autouse=True)
def cheap_networks(monkeypatch):
    """Inception files are not read, and the slow LPIPS is left out."""

    def make_extractor(path, *, batch_size, mesh):
        assert path.name == "given"
        return image_sets.network(batch_size, mesh.size)

    def make_score(backbones, mesh):
        return jax.jit(reconstruction.image_scores)

    monkeypatch.setattr(inception_features, "make_extractor", make_extractor)
    monkeypatch.setattr(decoder_scores, "make_score", make_score)


class FakeAutoencoder:
    """A linear map of patches there and back, with the smoke config's data."""

    def __init__(self):
        self.config = chain.load("rae_decoder")
        rng = np.random.default_rng(3)
        basis = np.linalg.qr(rng.standard_normal((192, 32)))[0].astype(np.float32)
        self.params = {"basis": basis}

    def encode(self, params, images):
        x = images.reshape(len(images), 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(len(images), 4, 4, 192) @ params["basis"]

    def decode(self, params, z):
        x = (z @ params["basis"].T).reshape(len(z), 4, 4, 8, 8, 3)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(z), SIDE, SIDE, 3)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A workdir with a config, whose networks are cheap."""
    loaded = FakeAutoencoder()
    monkeypatch.setattr(autoencoder, "load", lambda workdir: loaded)
    configs.save_config(loaded.config, tmp_path / "run" / "config.json")
    return tmp_path / "run"


def options(batch_size=8, devices=1, **changes):
    mesh = sharding.make_mesh(devices)
    changes = {"judges": judges.Judges(inception="given", batch_size=4)} | changes
    return decoder_scores.Options(batch_size=batch_size, mesh=mesh, **changes)


def validation_images(folder):
    config = autoencoder.load(folder).config
    with inputs.validation_batches(config.data) as batches:
        parts = [batch["image"][batch["mask"] > 0] for batch in batches]
    return np.concatenate(parts)


def run(capsys, *arguments):
    """Returns the exit status and all that the command printed."""
    status = main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


# Autoencoders.


def test_decoder_scores_depend_on_neither_batches_nor_devices(folder):
    expected = decoder_scores.decoder_scores(folder, options()).scores
    assert set(expected) == {"psnr", "ssim", "rfid_12", "num_images"}
    assert expected["num_images"] == NUM_IMAGES and expected["rfid_12"] > 0
    for other in (options(5, 1), options(16, 8)):
        found = decoder_scores.decoder_scores(folder, other).scores
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=LOOSE, err_msg=name)


def test_scores_are_those_of_the_ema_weights_while_training_and_after(runs, tmp_path):
    """The decoder's own evaluation has an `evaluation` block in its config."""
    folder = runs / "rae_decoder"
    images, loaded = validation_images(folder), autoencoder.load(folder)
    config = loaded.config.copy_and_resolve_references().unlock()
    config.evaluation = dict(inception="given", batch_size=4)
    reconstruct = rae_decoder.make_reconstruct(config)

    def psnr(part):
        params = checkpoints.load_params(folder, (part,))
        recon = reconstruct(params, loaded.params["encoder"], images)
        return float(np.mean(reconstruction.image_scores(images, recon)["psnr"]))

    after = decoder_scores.decoder_scores(folder, options()).scores
    assert abs(psnr("params") - psnr("ema_params")) > 1e-3
    assert after["psnr"] == pytest.approx(psnr("ema_params"), rel=1e-5)

    mesh = sharding.make_mesh(1)
    evaluate = online.make_evaluate(config, folder, mesh, reconstruct, None)
    state = types.SimpleNamespace(ema_params=loaded.params["decoder"])
    found = evaluate(state, {"encoder": loaded.params["encoder"]}, tmp_path)
    assert set(found) == {"psnr", "ssim", "rfid_12"}
    for name, value in found.items():
        assert value == pytest.approx(after[name], rel=LOOSE), name
    assert (tmp_path / "reconstructions.png").is_file()


def test_packed_images_and_references_take_the_place_of_the_split(folder, tmp_path):
    packed = tmp_path / "val.npz"
    np.savez(packed, arr_0=validation_images(folder))
    expected = decoder_scores.decoder_scores(folder, options()).scores
    reference = judges.Judges(inception="given", reference=str(packed), batch_size=4)
    for other in (options(images=packed), options(judges=reference)):
        found = decoder_scores.decoder_scores(folder, other).scores
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6)
    few = decoder_scores.decoder_scores(folder, options(images=packed, limit=5))
    assert few.scores["num_images"] == 5 and "fewer than 10000" in few.notes[0]
    np.savez(packed, arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"16 x 16 .* 32 x 32.*--size 32"):
        decoder_scores.decoder_scores(folder, options(images=packed))


# Noise on latents.


def test_robustness_curves(folder):
    curves, notes = decoder_scores.robustness_curves(
        folder, (1.0, 0.0, 0.3), seed=3, options=options()
    )
    plain = decoder_scores.decoder_scores(folder, options())
    assert curves["sigma"] == [0.0, 0.3, 1.0] and notes == plain.notes
    for name in ("psnr", "ssim", "rfid_12"):
        np.testing.assert_allclose(curves[name][0], plain.scores[name], rtol=LOOSE)
        assert len(set(curves[name])) == 3
    again, _ = decoder_scores.robustness_curves(
        folder, (0.0, 0.3, 1.0), seed=3, options=options(16, 8)
    )
    for name, values in curves.items():
        np.testing.assert_allclose(again[name], values, rtol=LOOSE)
    other, _ = decoder_scores.robustness_curves(
        folder, (0.3,), seed=4, options=options()
    )
    assert other["psnr"] != curves["psnr"][1:2]


def test_disturbance_has_the_strength_that_is_asked_for():
    z = jnp.ones((3, 20, 20, 8))
    found = robustness.disturbed(z, jnp.float32(0.5), 7, jnp.array([4, 1, 4])) - z
    np.testing.assert_allclose(found.std(), 0.5, rtol=0.05)
    np.testing.assert_array_equal(found[0], found[2])  # By index, not by place.
    assert abs(np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1]) < 0.1
    for sigmas in ((), (0.1, -1.0), (0.1, 0.1), (float("nan"),), (float("inf"),)):
        with pytest.raises(ValueError, match="from 0 upwards"):
            robustness.check_sigmas(sigmas)


def test_robustness_command(capsys, folder, tmp_path):
    out = tmp_path / "curve.json"
    status, text = run(
        *(capsys, "evaluate", folder, "--robustness", "--out", out),
        *("--sigmas", "0,0.5", "--limit", 4, "--batch-size", 8),
    )
    assert status == 0, text
    found = json.loads(out.read_text())
    assert found["sigma"] == [0.0, 0.5] and found["num_images"] == [4, 4]
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) >= 300
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    configs.save_config(chain.load("probe"), tmp_path / "probe" / "config.json")
    status, text = run(capsys, "evaluate", tmp_path / "probe", "--robustness")
    assert status == 1 and "only for runs of 'rae_decoder', not of 'probe'" in text


# Given latents.


def write_latents(path, folder, **arrays):
    loaded = autoencoder.load(folder)
    images = validation_images(folder).astype(np.float32) / 255.0
    z = np.asarray(jax.jit(loaded.encode)(loaded.params, images))
    if arrays:
        z = np.asarray(rae.normalize(z, arrays))
    np.savez(path, latents=z, labels=np.zeros(len(z), np.int32), **arrays)


@pytest.mark.parametrize("normalised", [False, True])
def test_latents_of_images_decode_to_their_reconstructions(
    folder, tmp_path, normalised
):
    path = tmp_path / "z.npz"
    shape = frozen.latent_shape(autoencoder.load(folder).config.encoder.sizes)
    rng = np.random.default_rng(0)
    stats = {
        "mean": rng.random(shape, np.float32),
        "var": rng.random(shape, np.float32),
    }
    write_latents(path, folder, **(stats if normalised else {}))
    found = decoder_scores.latent_scores(
        folder, path, options=options(5), picture=tmp_path / "z.png"
    )
    expected = decoder_scores.decoder_scores(folder, options()).scores["rfid_12"]
    np.testing.assert_allclose(found.scores["gfid_12"], expected, rtol=1e-3)
    assert {"sfid_12", "inception_score", "precision", "recall"} <= set(found.scores)
    assert found.scores["num_latents"] == NUM_IMAGES
    assert (tmp_path / "z.png").is_file()


def test_latents_that_cannot_be_used(folder, tmp_path):
    path = tmp_path / "z.npz"
    np.savez(path, arr_0=np.zeros((3, 2, 2, 5), np.float32))
    with pytest.raises(ValueError, match=r"\(n, 4, 4, 32\).*not float32 \(3, 2, 2, 5"):
        decoder_scores.latent_scores(folder, path, options=options())
    np.savez(path, arr_0=np.zeros((3, 4, 4, 32), np.uint8))
    with pytest.raises(ValueError, match="floating-point.*not uint8"):
        decoder_scores.latent_scores(folder, path, options=options())
    zeros = np.zeros((3, 4, 4, 32), np.float32)
    np.savez(path, arr_0=zeros, mean=zeros[0], var=zeros[0, 0])
    with pytest.raises(ValueError, match=r"mean and var must be \(4, 4, 32\)"):
        decoder_scores.latent_scores(folder, path, options=options())
    none = options(judges=judges.Judges())
    with pytest.raises(ValueError, match="--inception FILE or --efflite0"):
        decoder_scores.latent_scores(folder, path, options=none)
