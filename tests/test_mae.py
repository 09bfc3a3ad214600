"""MAE: what is masked, the loss, the encoder that a run leaves."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.layers import patches, positions
from rae_jax.losses import masked
from rae_jax.models import encoders, mae, vit_encoder
from rae_jax.trainers import backbones, frozen, inputs, registry, weights
from rae_jax.trainers import mae as trainer
from rae_jax.training import checkpoints, state

PATH = "configs/mae.py"
TIERS = ("", "_tier_small", "_photos", "_digits", "_smoke")


@functools.cache
def network() -> mae.MAE:
    """Two blocks of 32 features, a decoder of one with 16, 16 patches of 8 pixels."""
    make = trainer.make_model(load("t4_mae_l_smoke"))
    return nnx.jit(lambda: make(nnx.Rngs(0)))()


def images(count: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, 32, 32, 3)), "f4")


def noise(count: int = 3) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (count, 16))


@jax.jit
def run(model, x, y):
    return model(x, y)


def load(variant: str, *overrides: str) -> ConfigDict:
    return configs.load_config(
        f"{PATH}:{variant}", [f"--config.{o}" for o in overrides]
    )


# The network


def test_a_quarter_is_seen_those_of_least_noise():
    predicted, mask = run(network(), images(), noise())
    assert predicted.shape == (3, 16, 192) and predicted.dtype == jnp.float32
    seen = np.argsort(noise(), axis=1)[:, :4]
    assert (np.asarray(mask).sum(axis=1) == 12).all()
    assert (np.take_along_axis(np.asarray(mask), seen, axis=1) == 0).all()


def test_predictions_depend_on_what_is_seen_alone():
    predicted, mask = run(network(), images(), noise())
    cut = patches.patchify(images(), 8)
    for changes, part in ((False, mask), (True, 1 - mask)):
        other = patches.unpatchify(cut + 3 * part[:, :, None], 8)
        found, _ = run(network(), other, noise())
        assert (np.abs(found - predicted).max() > 1e-3) == changes


def test_seen_patches_keep_their_places():
    """In any order of the encoder's tokens: noise is only about which are seen."""
    first = noise()
    ranks = jnp.argsort(jnp.argsort(first, axis=1), axis=1)
    turned = jnp.where(ranks < 4, 3.0 - ranks, ranks + 1.0)  # The four in reverse.
    predicted, mask = run(network(), images(), first)
    found, same = run(network(), images(), turned)
    np.testing.assert_array_equal(mask, same)
    np.testing.assert_allclose(found, predicted, atol=2e-6)


def test_initial_values_are_those_of_the_official_code():
    params = flax.traverse_util.flatten_dict(state.param_dict(network()), sep=".")
    table = positions.sincos_2d(32, 4)
    np.testing.assert_array_equal(params["encoder.pos_embed"][0, 1:], table)
    assert not np.any(params["encoder.pos_embed"][0, 0])
    np.testing.assert_array_equal(
        params["decoder.pos_embed"][0, 1:], positions.sincos_2d(16, 4)
    )
    for name, x in params.items():
        if name.endswith("kernel"):
            bound = np.sqrt(6 / sum(x.shape[-2:]))
            assert 0.97 * bound < np.abs(x).max() <= bound, name
            np.testing.assert_allclose(x.std(), bound / np.sqrt(3), rtol=0.08)
        elif name.endswith("bias"):
            assert not np.any(x), name
    for name in ("encoder.cls_token", "decoder.mask_token"):
        assert 0.01 < params[name].std() < 0.03


def test_decay_leaves_out_biases_norms_and_positions():
    marks = trainer.decayed(state.param_dict(network()))
    flat = flax.traverse_util.flatten_dict(marks, sep=".")
    without = {name for name, mark in flat.items() if not mark}
    ends = {name.rsplit(".", 1)[-1] for name in without}
    assert ends == {"bias", "scale", "pos_embed"}
    assert flat["encoder.cls_token"] and flat["decoder.mask_token"]
    assert flat["encoder.blocks.block.attn.qkv.kernel"]


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_masks_that_leave_nothing_are_refused(ratio):
    with pytest.raises(configs.ConfigError, match="at least one to see"):
        registry.design(load("smoke", f"model.mask_ratio={ratio}"))


# The loss


def test_targets_are_normalised_by_patch():
    x = 5 + 3 * np.random.default_rng(0).normal(size=(2, 4, 48)).astype(np.float32)
    target, mean, std = masked.targets(x, norm_pixels=True)
    np.testing.assert_allclose(target.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(target.std(axis=-1, ddof=1), 1, atol=1e-5)
    np.testing.assert_allclose(target * std + mean, x, atol=1e-4)
    same, mean, std = masked.targets(x, norm_pixels=False)
    assert same is x and not mean.any() and (std == 1).all()


def test_loss_is_the_mean_over_what_is_not_seen():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 5))
    mask = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]], float)
    errors = ((a - b) ** 2)[mask > 0]
    loss, by_image = masked.masked_loss(
        jnp.asarray(a), jnp.asarray(b), jnp.asarray(mask)
    )
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-5)
    expected = errors.reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(by_image, expected, rtol=1e-5)


def test_positions_get_no_gradient():
    def loss(model, x, y):
        return trainer.errors(model, x, y, True)[0]

    grads = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(network(), images(), noise()))
    flat = flax.traverse_util.flatten_dict(grads, sep=".")
    for name, grad in flat.items():
        assert np.any(grad) != name.endswith("pos_embed"), name


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_pictures_show_what_is_seen_and_predicted(norm_pixels, monkeypatch):
    """Right predictions give the images back, whatever their targets are."""
    model, cut = network(), patches.patchify(images(), 8)
    target, _, _ = masked.targets(cut, norm_pixels=norm_pixels)
    mask = run(model, images(), noise())[1]
    monkeypatch.setattr(mae.MAE, "__call__", lambda *_: (target, mask))
    seen, found = trainer.reconstruct(model, images(), noise(), norm_pixels)
    np.testing.assert_allclose(found, images(), atol=1e-5)
    mean, std = (
        np.asarray(x) for x in (model.encoder.image_mean, model.encoder.image_std)
    )
    hidden = np.asarray(mask) > 0
    colours = np.asarray(patches.patchify(np.asarray(seen) * std + mean, 8))[hidden]
    np.testing.assert_allclose(colours, trainer.GRAY, atol=1e-6)
    same = patches.patchify(seen, 8)[~hidden], cut[~hidden]
    np.testing.assert_array_equal(*same)


# Runs


@pytest.mark.parametrize("row", ["t4_mae_b", "t4_mae_l"])
def test_rows_are_those_of_the_table(row):
    """Sizes of the paper: 111.9 and 329.5 M parameters, tables included."""
    counts = {}
    for tier in TIERS:
        config = load(row + tier)
        assert (config.row, config.trainer) == (row, "mae")
        assert config.tier == (tier.removeprefix("_tier_").strip("_") or "paper")
        model = nnx.eval_shape(lambda c=config: trainer.make_model(c)(nnx.Rngs(0)))
        leaves = jax.tree.leaves(state.param_dict(model))
        counts[tier] = sum(x.size for x in leaves)
        assert config.data.transform == "mae" and model.num_visible >= 4
    assert counts[""] == {"t4_mae_b": 111_907_840, "t4_mae_l": 329_541_888}[row]
    config = load(row)
    assert (config.num_steps, config.optimizer.peak_lr) == (1600 * 312, 2.4e-3)


def test_loss_falls_on_one_batch():
    config = load(
        "t4_mae_b_photos",
        "data.batch_size=8",
        "model.depth=1",
        "model.decoder_depth=1",
        "optimizer.warmup_steps=0",
        "optimizer.peak_lr=3e-3",
    )
    design = registry.design(config)
    batch = {"image": inputs.examples(config.data, "train", 8)}
    key, losses = jax.random.key(0), []
    run_state, step = jax.jit(design.init)(key), jax.jit(design.step, donate_argnums=0)
    for _ in range(30):
        run_state, metrics = step(run_state, {}, batch, key)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.95 and np.mean(losses[-5:]) < 0.8 * losses[0]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the network above, with a checkpoint as the loop writes them."""
    folder = tmp_path_factory.mktemp("mae")
    configs.save_config(load("t4_mae_l_smoke"), folder / checkpoints.CONFIG_NAME)
    params = state.param_dict(network())
    average = jax.tree.map(lambda x: x / 2, params)
    writer = checkpoints.Checkpoints(folder, keep=1)
    writer.save(1, state.TrainState(jnp.ones(()), params, average, ()), {})
    writer.close()
    return folder


def encoder_block(workdir, **changes) -> ConfigDict:
    sizes = backbones.arguments(configs.read_config(workdir / "config.json"))
    block = dict(name=sizes.pop("name"), weights=str(workdir), sizes=sizes | changes)
    return ConfigDict(block)


def test_encoder_of_a_run_is_one_of_the_family(workdir):
    """It gives the tokens of the trained network when nothing is masked."""
    block = encoder_block(workdir, normalize=False)
    params = frozen.load_encoder(block, workdir)
    graphdef, shapes = frozen.encoder(block)
    frozen.check_shapes("The encoder", shapes, params)
    trained = weights.load(weights.open_source(str(workdir), "mae"))
    assert isinstance(trained, mae.MAE)
    everything = jnp.broadcast_to(jnp.arange(16), (3, 16))
    expected = nnx.jit(lambda m, x: m.encode(x, everything))(trained, images())[:, 1:]
    found = nnx.jit(lambda m, x: m(x))(nnx.merge(graphdef, params), images())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    usual = encoder_block(workdir)
    frozen.check_shapes(
        "It", frozen.encoder(usual)[1], frozen.load_encoder(usual, workdir)
    )
    block.ema = True
    average = frozen.load_encoder(block, workdir)
    np.testing.assert_array_equal(2 * average["cls_token"], params["cls_token"])


def test_unfit_sizes_are_named(workdir):
    block = encoder_block(workdir, hidden_size=64)
    with pytest.raises(
        configs.ConfigError, match="hidden_size = 64, the files have 32"
    ):
        frozen.load_encoder(block, workdir)
    block.name = "dino"
    with pytest.raises(configs.ConfigError, match="name = dino, the files have mae"):
        frozen.load_encoder(block, workdir)


def test_run_is_exported_as_hugging_face_has_it(workdir, tmp_path):
    opened = weights.open_source(str(workdir))
    assert opened.cls is vit_encoder.ViTEncoder
    opened.write(tmp_path / "encoder", "huggingface")
    found = vit_encoder.ViTEncoder.from_pretrained(
        tmp_path / "encoder", normalize=False
    )
    model = weights.load(opened)
    same = jax.tree.map(np.array_equal, *map(state.param_dict, (found, model)))
    assert all(jax.tree.leaves(same))
    whole = weights.open_source(str(workdir), "mae")
    whole.write(tmp_path / "whole", "huggingface")
    found = mae.MAE.from_pretrained(tmp_path / "whole")
    same = jax.tree.map(
        np.array_equal, *map(state.param_dict, (found, weights.load(whole)))
    )
    assert all(jax.tree.leaves(same))
    again = weights.open_source(str(tmp_path / "whole"))  # The encoder, as published.
    assert again.cls is vit_encoder.ViTEncoder
    with pytest.raises(configs.ConfigError, match="model_type 'vit_mae'"):
        mae.MAE.from_pretrained(workdir)


def test_published_encoders_have_presets_for_it():
    assert {p["name"] for p in encoders.PRESETS.values()} >= {"mae", "mocov3", "dino"}
