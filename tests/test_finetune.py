"""Fine-tuning: rates by layer, dropped branches, mixed pairs, what it begins with."""

import chain
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from rae_jax import config as configs
from rae_jax.losses import mixing
from rae_jax.models import ldae_encoder, vit, vit_classifier, vit_encoder
from rae_jax.trainers import finetune
from rae_jax.training import optimizers, sharding, state

SIZES = dict(image_size=16, patch_size=4, hidden_size=16, depth=4, num_heads=2)
SIZES |= dict(intermediate_size=32)


def load(*overrides):
    path = f"{chain.ROOT}/configs/finetune.py:smoke"
    return configs.load_config(path, [f"--config.{text}" for text in overrides])


def classifier(name="dino", token="mean"):
    def make():
        def encoder(**options):
            return vit_encoder.ViTEncoder(name, **SIZES | options)

        return vit_classifier.ViTClassifier(encoder, 5, token=token, rngs=nnx.Rngs(0))

    return nnx.jit(make)()


def test_rates_fall_layer_by_layer():
    """Closed form: 1 behind the blocks, 0.5^(depth - i) in block i, 0.5^(depth + 1)."""
    params = state.param_dict(classifier())
    rates = optimizers.layer_rates(params, 0.5)
    encoder = rates["encoder"]
    for name in ("cls_token", "pos_embed"):
        assert float(encoder[name]) == 0.5**5
    assert float(encoder["patch_embed"]["proj"]["kernel"]) == 0.5**5
    for leaf in jax.tree.leaves(encoder["blocks"]):
        np.testing.assert_allclose(leaf.ravel(), [0.5**4, 0.5**3, 0.5**2, 0.5])
    for name in ("norm", "head"):
        assert {float(x) for x in jax.tree.leaves(rates[name])} == {1.0}

    config = load("optimizer.warmup_steps=0", "optimizer.weight_decay=0.1")
    both = []
    for decay in (1.0, 0.5):
        tx, _ = optimizers.make_optimizer(
            config.optimizer, 9, rates=lambda p, d=decay: optimizers.layer_rates(p, d)
        )
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        both.append(updates)
    expected = jax.tree.map(lambda u, rate: u * rate, both[0], rates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), both[1], expected
    )


def test_dropped_branches():
    """Shares rise to the rate; a dropped sample passes a block; the mean is 1."""
    keep = np.asarray(vit.draw_keep(jax.random.key(0), 0.4, 5, 4000))
    rates = np.linspace(0, 0.4, 5)
    np.testing.assert_allclose(np.mean(keep == 0, axis=(1, 2)), rates, atol=0.03)
    np.testing.assert_allclose(keep.max(axis=(1, 2)), 1 / (1 - rates), rtol=1e-6)
    with pytest.raises(ValueError, match="within .0, 1., got 1"):
        vit.draw_keep(jax.random.key(0), 1.0, 5, 2)

    model = classifier().encoder
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    keep = np.ones((4, 2, 2), np.float32)
    keep[1:, :, 0] = 0  # The first sample leaves after the first block.
    run = jax.jit(
        lambda m, x, k: (m.block_tokens(x, [3], k), m.block_tokens(x, [0, 3]))
    )
    (found,), (first, last) = run(model, x, keep)
    np.testing.assert_allclose(found[0], first[0], atol=1e-6)
    np.testing.assert_allclose(found[1], last[1], atol=1e-6)
    assert np.abs(first[0] - last[0]).max() > 1e-3


@pytest.mark.parametrize("token", vit_classifier.TOKENS)
def test_classifier_reads_one_vector(token):
    model = classifier(token=token)
    assert (model.encoder.norm.scale is None) == (token == "mean")
    kernel = np.asarray(model.head.kernel[...])
    assert 0 < np.abs(kernel).max() < 5e-5
    model.head.kernel[...] = jnp.ones((16, 5)) * jnp.arange(1.0, 17)[:, None]
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
    mean, std = (
        np.asarray(getattr(model.encoder, f"image_{n}")) for n in ("mean", "std")
    )
    x = jnp.asarray((images - mean) / std, jnp.float32)
    found, (tokens,) = jax.jit(lambda m, i, x: (m(i), m.encoder.block_tokens(x, [3])))(
        model, images, x
    )
    vector = tokens[:, 0] if token == "cls" else jnp.mean(tokens[:, 1:], axis=1)
    norm = model.encoder.norm if token == "cls" else model.norm
    expected = norm(vector) @ model.head.kernel[...]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_families_without_a_class_token_are_refused():
    with pytest.raises(configs.ConfigError, match="'ijepa' have no class token"):
        classifier("ijepa", "cls")
    with pytest.raises(configs.ConfigError, match="token 'mena'"):
        classifier(token="mena")


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_pairs_and_their_labels(kind):
    """Image i with its mirror in the batch; the label's share is that of the pixels."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(4, 12, 10, 3)), jnp.float32)
    labels = jnp.asarray([0, 1, 2, 3])
    alphas = dict(mixup=0.0, cutmix=0.0) | {kind: 1.0}

    @jax.jit
    def run(key):
        return mixing.mix(images, labels, key, num_classes=5, **alphas)

    shares = []
    for seed in range(8):
        mixed, soft = map(np.asarray, run(jax.random.key(seed)))
        np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)
        hard = (soft - 0.1 / 5) / 0.9
        share = hard[0, 0]
        np.testing.assert_allclose(hard[0, 3], 1 - share, atol=1e-5)
        np.testing.assert_allclose(hard[2, [2, 1]], [share, 1 - share], atol=1e-5)
        other = images[::-1]
        if kind == "mixup":
            expected = share * images + (1 - share) * other
            np.testing.assert_allclose(mixed, expected, atol=1e-5)
        else:
            pasted = np.all(mixed == other, axis=(0, 3))
            kept = np.all(mixed == images, axis=(0, 3))
            assert (pasted ^ kept).all()
            np.testing.assert_allclose(kept.mean(), share, atol=1e-5)
            rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
            assert pasted.sum() == len(rows) * len(columns)  # One rectangle.
        shares.append(share)
    assert np.ptp(shares) > 0.2


def test_unmixed_labels_are_smoothed_only():
    images, labels = jnp.zeros((2, 4, 4, 3)), jnp.asarray([1, 0])
    options = dict(mixup=0.0, cutmix=0.0, num_classes=4)
    same, soft = mixing.mix(images, labels, jax.random.key(0), **options)
    assert same is images
    np.testing.assert_allclose(soft[0], [0.025, 0.925, 0.025, 0.025], atol=1e-6)
    logits = jnp.asarray([[0.0, 2, 1, 0], [1, 0, 0, 0]])
    expected = -np.mean(np.sum(soft * jax.nn.log_softmax(logits), axis=1))
    np.testing.assert_allclose(mixing.soft_cross_entropy(logits, soft), expected)
    for wrong in (dict(mixup=-1.0), dict(switch=2.0), dict(label_smoothing=-0.1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            options = dict(num_classes=4) | wrong
            mixing.mix(images, labels, jax.random.key(0), **options)


def test_a_run_begins_with_the_merged_encoder(tmp_path):
    """Weights and average, from an l-DAE encoder on disk at its level; new head."""
    config = load("encoder.weights=ldae", "model.token=mean", "layer_decay=0.5")
    encoder = networks.drawn(ldae_encoder.LDAEEncoder, **config.encoder.sizes.to_dict())
    encoder.save_pretrained(tmp_path / "ldae")
    mesh = sharding.make_mesh(1)
    with jax.set_mesh(mesh):
        program = finetune.build(config, tmp_path, mesh)
        new = jax.jit(program.design.init)(jax.random.key(0))
        begun = program.begin(new)
        before = jax.tree.map(np.asarray, begun.params)
        merged = state.param_dict(encoder.merged())
        for params in (begun.params, begun.ema_params):
            jax.tree.map(np.testing.assert_array_equal, params["encoder"], merged)
        assert (
            np.abs(new.params["head"]["kernel"] - before["head"]["kernel"]).max() == 0
        )
        batches = program.batches()
        batch = jax.tree.map(jnp.asarray, next(batches))
        batches.close()
        step = jax.jit(program.design.step, donate_argnums=0)  # Shares no buffer.
        begun, metrics = step(begun, {}, batch, jax.random.key(1))
        assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, begun.params)
    assert min(jax.tree.leaves(moved["head"])) > 0
    assert 0 < moved["encoder"]["pos_embed"] < moved["head"]["bias"]
    wrong = load("encoder.weights=ldae", "encoder.sizes.depth=1")
    with pytest.raises(configs.ConfigError, match="depth = 1, the encoder has 2"):
        finetune.load_encoder(wrong, tmp_path)


def test_what_cannot_be_fine_tuned_is_refused_by_shape_alone():
    config = load(
        "encoder.sizes.tokenizer=conv_vae", "encoder.sizes.input_space=latent"
    )
    with pytest.raises(configs.ConfigError, match="'conv_vae' is a convolutional"):
        finetune.design(config)
    with pytest.raises(configs.ConfigError, match="encoder takes images of 32"):
        finetune.design(load("data.image_size=16"))
    config = load()
    with config.unlocked():
        config.encoder.name = "pixels"
    with pytest.raises(configs.ConfigError, match="'pixels' is no vision"):
        finetune.design(config)
