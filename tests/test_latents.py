"""Cached latents: what is stored, in which order it is read, what is refused."""

import itertools
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain import load
from flax import nnx
from PIL import Image

from rae_jax import main
from rae_jax.data import latents, loader
from rae_jax.models import encoders, rae
from rae_jax.trainers import frozen, inputs, latent_cache, registry
from rae_jax.trainers import latents as latent_inputs
from rae_jax.training import sharding

COUNT = 20  # images
CONFIG = "configs/dit_dh.py:smoke"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for k in range(COUNT):
        path = root / f"class{k % 3}" / f"{k:02d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((60, 44)).save(path)
    return root


def overrides(folder, *more):
    data = ("data.source=class_folder", f"data.path={folder}", "mesh.data=1")
    return [*data, "model.num_classes=3", *more]


def config(folder, *more):
    return load("latent_diffusion", *overrides(folder, *more))


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    """The latents of the images, written by the command."""
    out = tmp_path_factory.mktemp("cache") / "latents"
    words = [f"--config.{text}" for text in overrides(folder)]
    words += ["--shards", "3", "--batch-size", "8"]
    command = ["prepare", "--latents", str(out), "--config", CONFIG]
    assert main.main([*command, *words]) == 0
    return out


def take(batches, count):
    with batches:
        return list(itertools.islice(batches, count))


def encode(config, images):
    """Encodes uint8 images as the step does."""
    graphdef, _ = frozen.encoder(config.encoder)
    params = frozen.load_encoder(config.encoder, ".")
    z = rae.encode_raw(
        nnx.merge(graphdef, params), inputs.to_float(jnp.asarray(images))
    )
    return np.asarray(z)


def assert_rounded(latent, raw):
    """Equal to rounding to bfloat16, of values around 1."""
    assert latent.dtype == latents.DTYPE
    np.testing.assert_allclose(latent.astype(np.float32), raw, rtol=2**-8, atol=1e-4)


def test_batches_are_those_of_the_images(folder, cache):
    """The same images in the same order, mirrored where they are; also after 7."""
    online = take(inputs.train_batches(config(folder).data, 5), 9)
    cached_data = config(folder, f"data.latents={cache}").data
    with inputs.train_batches(cached_data, 5) as batches:
        for expected, batch in zip(online, batches, strict=False):
            assert set(batch) == {"latent", "label", "index"}
            np.testing.assert_array_equal(batch["index"], expected["index"])
            np.testing.assert_array_equal(batch["label"], expected["label"])
            assert_rounded(batch["latent"], encode(config(folder), expected["image"]))
        batches.set_state({"batches": 7})
        again = next(batches)
    np.testing.assert_array_equal(again["index"], online[7]["index"])
    assert_rounded(again["latent"], encode(config(folder), online[7]["image"]))
    # The fixture tells mirror images apart, and both kinds were seen.
    plain = latents.Latents(cache).latent(3), latents.Latents(cache).latent(3, True)
    assert np.abs(plain[0] - plain[1]).max() > 0.1


def test_workers_and_processes_share_the_same_batches(cache):
    source = latents.Latents(cache)
    choose = latents.Choose(source, "random")
    options = dict(batch_size=8, seed=3)
    whole = take(loader.train_batches(source, choose, **options), 4)
    workers = take(loader.train_batches(source, choose, num_workers=2, **options), 4)
    halves = [
        take(
            loader.train_batches(
                source, choose, process_index=k, process_count=2, **options
            ),
            4,
        )
        for k in range(2)
    ]
    for step, batch in enumerate(whole):
        for key, rows in batch.items():
            assert workers[step][key].dtype == rows.dtype
            np.testing.assert_array_equal(workers[step][key], rows)
            joined = np.concatenate([half[step][key] for half in halves])
            np.testing.assert_array_equal(joined, rows)


def test_training_without_an_encoder_gives_the_same_losses(folder, cache, tmp_path):
    online, cached = config(folder), config(folder, f"data.latents={cache}")
    losses, first = [], None
    for name, c in (("online", online), ("cached", cached)):
        program = registry.trainer(c).build(c, tmp_path / name, sharding.make_mesh(1))
        assert ("encoder" in program.frozen) == (name == "online")
        step = jax.jit(program.design.step)
        first = first or jax.jit(program.design.init)(jax.random.key(0))
        state, key = first, jax.random.key(1)
        losses.append([])
        for batch in take(program.batches(), 3):
            expected = program.design.batch
            assert {k: v.shape for k, v in batch.items()} == {
                k: v.shape for k, v in expected.items()
            }
            batch = loader.to_global(
                batch, sharding.batch_sharding(sharding.make_mesh(1))
            )
            state, metrics = step(state, program.frozen, batch, key)
            losses[-1].append(float(metrics["loss"]))
    # Rounding has a relative size of 2^-9 in each entry and averages out.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[0] != losses[1]


def test_statistics_of_cached_latents_are_those_of_the_images(folder, cache, tmp_path):
    """Of the images and their mirror images, without an encoder."""
    found = []
    for name in ("", str(cache)):
        words = overrides(folder, f"data.latents={name}", "num_steps=0")
        c = load("latent_stats", *(w for w in words if not w.startswith("model")))
        assert c.both_orientations
        registry.train(c, tmp_path / f"run{len(found)}")
        found.append(np.load(tmp_path / f"run{len(found)}" / frozen.STATS_NAME))
    for key in ("mean", "var"):
        np.testing.assert_allclose(found[1][key], found[0][key], rtol=0.02, atol=2e-3)


def test_random_latents_are_drawn_from_cached_moments(folder, cache):
    """A KL autoencoder's: the cache holds moments, the step draws with its key."""
    online, cached = config(folder), config(folder, f"data.latents={cache}")
    for c in (online, cached):
        with c.unlocked():
            c.encoder = encoders.block("sd_vae_smoke")
    networks = latent_inputs.load(online, ".")
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    key = jax.random.key(3)

    @jax.jit
    def encode_and_draw(networks, batch):
        encoder, raw = latent_inputs.reader(online)(networks, batch)
        z = rae.to_latents(encoder, raw, key)
        return raw, rae.normalize(z, networks["stats"])

    raw, expected = encode_and_draw(networks, {"image": image})
    batch = {"latent": raw.astype(jnp.bfloat16)}
    stats, shape = {"stats": networks["stats"]}, latent_cache.raw_shape(cached)
    assert (
        raw.shape == (2, *shape) and shape[-1] == 2 * online.encoder.sizes.hidden_size
    )
    drawn = latent_inputs.of_batch(cached)(stats, batch, key)
    np.testing.assert_allclose(drawn, expected, rtol=2**-6, atol=2**-7)
    mean = latent_inputs.of_batch(cached)(stats, batch)
    assert np.abs(drawn - mean).max() > 0.01


def test_a_stopped_run_keeps_finished_shards(folder, cache, tmp_path, monkeypatch):
    out, mesh = tmp_path / "latents", sharding.make_mesh()  # As the command's.

    def job():
        return latent_cache.make_job(
            config(folder), out, mesh, batch_size=8, num_shards=3
        )

    def stop(count):
        counted.append(count)
        if sum(counted) == 9:
            raise KeyboardInterrupt

    counted = []
    with pytest.raises(KeyboardInterrupt):
        job().run(mesh, stop)
    with pytest.raises(ValueError, match="run the same command again"):
        latents.Latents(out)
    first = sorted(out.glob("latents-00000*"))[0]
    written = first.stat().st_mtime_ns
    assert job().bytes_to_write == latents.num_bytes(13, (4, 4, 32), True)
    counted = []
    job().run(mesh, counted.append)
    assert first.stat().st_mtime_ns == written
    assert counted[0] == 7 and sum(counted) == COUNT
    for path in cache.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    job().run(mesh, lambda count: None)  # There is nothing left to do.
    changed = config(folder, "data.flip=False")
    with pytest.raises(ValueError, match="prepared with other.* flip"):
        latent_cache.make_job(changed, out, mesh).run(mesh, print)


@pytest.mark.parametrize(
    "change, message",
    [
        ("encoder.sizes.depth=3", "encoder.sizes.depth = 3, the cache has 2"),
        ("data.image_size=64", "data.image_size = 64, the cache has 32"),
        ("data.split=all", "data.split = 'all', the cache has 'train'"),
        ("data.transform=none", "data.transform = 'none', the cache has 'center_crop'"),
        ("encoder.weights=elsewhere", "weights = 'elsewhere'.*the cache has 'random'"),
    ],
)
def test_latents_of_another_kind_are_refused(folder, cache, tmp_path, change, message):
    other = config(folder, f"data.latents={cache}", change)
    with pytest.raises(ValueError, match=message):
        latent_inputs.load(other, tmp_path)


def test_other_weights_are_refused(folder, cache, tmp_path, monkeypatch):
    """They are told by their values, whatever their name."""
    same = config(folder, f"data.latents={cache}")
    params = frozen.load_encoder(same.encoder, tmp_path)
    (tmp_path / "random").mkdir()  # Now the name is that of a folder here.
    monkeypatch.setattr(frozen, "load_encoder", lambda *_: params)
    latent_inputs.check(same, tmp_path)
    params = jax.tree.map(lambda x: x + 1e-6, params)
    with pytest.raises(ValueError, match="weights = 'random' with checksum .* has"):
        latent_inputs.check(same, tmp_path)


def test_mirror_images_need_their_latents(folder, cache, tmp_path):
    mesh, plain = sharding.make_mesh(1), config(folder, "data.flip=False")
    latent_cache.make_job(plain, tmp_path, mesh).run(mesh, lambda count: None)
    flipped = config(folder, f"data.latents={tmp_path}")
    with pytest.raises(ValueError, match="data.flip = True, the cache has False"):
        latent_inputs.check(flipped, tmp_path)
    with pytest.raises(ValueError, match="no latents of mirror images"):
        inputs.train_batches(flipped.data, 0)
    # The other way round the images as they are can be told from the others.
    fewer = config(folder, f"data.latents={cache}", "data.flip=False")
    latent_inputs.check(fewer, tmp_path)
    (batch,) = take(inputs.train_batches(fewer.data, 0), 1)
    images = take(inputs.train_batches(plain.data, 0), 1)[0]["image"]
    assert_rounded(batch["latent"], encode(plain, images))


def test_damage_is_found(cache, tmp_path):
    broken = shutil.copytree(cache, tmp_path / "broken")
    first, second = sorted(broken.glob("latents-*"))[:2]
    second.unlink()
    with pytest.raises(ValueError, match="lacks 'latents-00001"):
        latents.Latents(broken)
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="damaged: the record of image 7|records, but"):
        latents.Latents(broken).latent(7)


def test_other_trainers_want_images(cache):
    with pytest.raises(ValueError, match="this trainer needs the images"):
        registry.design(load("ldae", f"data.latents={cache}"))


def test_features_of_images_need_images(folder):
    """A design reads no file: the folder of latents need not exist."""
    c = config(folder, "data.latents=elsewhere")
    assert registry.design(c).batch["latent"].shape == (8, 4, 4, 32)
    with pytest.raises(ValueError, match="repa.target = 'encoder' needs the images"):
        latent_inputs.abstract_batch(config(folder, "data.latents=a", "repa.weight=1"))


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--latents needs --config"),
        (["SRC", "--config", CONFIG], "SRC does not belong to it"),
        (["--config", "configs/claims"], "No config file"),
        (
            ["--config", CONFIG, "--config.data.transform=random_resized_crop"],
            "crops anew in every epoch",
        ),
        (["--config", CONFIG, "--config.encoder.weights="], "weights is empty"),
    ],
)
def test_the_command_explains_what_it_cannot_do(words, message, tmp_path, capsys):
    target = ["--latents", str(tmp_path / "out")]
    assert main.main(["prepare", *target, *words]) == 1
    assert message in capsys.readouterr().err


def test_too_little_space_is_seen_before_the_work(folder, tmp_path, monkeypatch):
    mesh = sharding.make_mesh(1)
    job = latent_cache.make_job(config(folder), tmp_path / "out", mesh)
    assert "(4, 4, 32) of each image and its mirror image" in job.describe()
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match="needs 41.6 kB more, but only 1.0 kB are free"
    ):
        job.describe()


def test_sizes_are_told_in_words():
    bytes_of_imagenet = latents.num_bytes(1_281_167, (16, 16, 768), True)
    assert latent_cache.human(bytes_of_imagenet) == "1.0 TB"
