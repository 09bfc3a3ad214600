"""Linear probes: sweeps of heads, class tokens, nearest neighbours, results."""

import json

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from rae_jax import config as configs
from rae_jax.evaluation import neighbours
from rae_jax.models import tokenizers
from rae_jax.trainers import (
    following,
    frozen,
    inputs,
    ldae_runs,
    probe,
    probe_heads,
    probe_scores,
    registry,
)
from rae_jax.training import checkpoints, logs, optimizers

SWEEP = [
    "sweep.blocks=(1,2)",
    "sweep.times=(0,40)",
    "sweep.noisy=(False,True)",
    "sweep.lrs=(0.1,6.4)",
]


def trained(config, steps=3):
    """The state after some steps on the first batches of a run."""
    design = probe.design(config)
    encoder = frozen.load_encoder(config.encoder, ".")
    networks = {name: encoder for name in design.frozen}
    step = jax.jit(design.step)
    state = jax.jit(design.init)(jax.random.key(0))
    with inputs.train_batches(config.data, config.seed) as batches:
        for _ in range(steps):
            batch = jax.tree.map(jnp.asarray, next(batches))
            state, metrics = step(state, networks, batch, jax.random.key(1))
    return state, metrics


def test_a_head_alone_is_the_same_head_of_a_sweep():
    """LARS and noise included, after three steps; float32, 1e-5."""
    config = chain.load("probe", *SWEEP)
    state, metrics = trained(config)
    heads = probe_heads.heads(config)["encoder"]
    assert len(heads) == 16 and len({head.name for head in heads}) == 16
    (index,) = [i for i, h in enumerate(heads) if h.name == "b1_t40_noisy_lr0.1"]
    assert heads[index].view == probe_heads.View(1, 40, True)

    changes = ["noisy=True", "optimizer.peak_lr=0.1", "optimizer.accumulate=2"]
    alone = chain.load("probe", *changes, "sweep.blocks=(1,)")
    alone.encoder.sizes.time_index = 40
    single, single_metrics = trained(alone)
    found, expected = single.params["encoder"], state.params["encoder"]
    assert found["kernel"].shape[0] == 1
    begin = jax.jit(probe.design(alone).init)(jax.random.key(0)).params["encoder"]
    for name in ("kernel", "bias"):
        moved = np.abs(found[name] - begin[name]).max()
        close = np.abs(found[name][0] - expected[name][index]).max()
        assert moved > 0 and close < 1e-3 * moved, name
    loss = single_metrics["loss_b1"]
    np.testing.assert_allclose(metrics["loss_b1_t40_noisy_lr0.1"], loss, rtol=1e-5)
    stats = [s.stats["encoder"]["mean"] for s in (single, state)]
    np.testing.assert_allclose(stats[0][0], stats[1][index // 2], atol=1e-6)


def test_features_without_labels_give_chance():
    """1000 classes, 50,000 held-out features: 0.1 % within four standard errors."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 52_000, 8)).astype(np.float32)
    labels = rng.integers(0, 1000, 52_000)
    config = chain.load("probe", "num_classes=1000", "optimizer.warmup_steps=0")
    tx, _ = optimizers.make_optimizer(config.optimizer, 20)
    params = probe._init_heads(jax.random.key(0), "encoder", 8, 1, config)
    opt_state = jax.vmap(tx.init)(params)

    @jax.jit
    def step(params, opt_state):
        return probe._update(
            tx, jnp.ones(1), params, opt_state, x[:, :2000], jnp.asarray(labels[:2000])
        )

    for _ in range(20):
        losses, params, opt_state = step(params, opt_state)
    scores = np.asarray(probe_scores.logits(params, x[:, 2000:]))[0]
    assert losses[0] < np.log(1000)  # It learned what cannot be carried over.
    top1 = np.mean(scores.argmax(axis=-1) == labels[2000:])
    assert abs(top1 - 0.001) < 4 * np.sqrt(0.001 / 50_000)


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_rates_multiply_the_momentum(name):
    """As in MAE: at a rate of 0 nothing moves, whatever moved before."""
    config = chain.load("probe", f"optimizer.name={name}", "optimizer.warmup_steps=0")
    tx, schedule = optimizers.make_optimizer(config.optimizer, 1)
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    first, opt_state = tx.update(params, tx.init(params), params)
    ratio = optimizers.TRUST if name == "lars" else 1.0
    np.testing.assert_allclose(first["kernel"], -6.4 * ratio, rtol=1e-6)
    np.testing.assert_allclose(first["bias"], -6.4, rtol=1e-6)
    assert float(schedule(1)) == 0
    second, _ = tx.update(params, opt_state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(second))


def test_logits_of_stacked_heads():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3)).astype(np.float32)
    params = {"kernel": rng.normal(size=(4, 3, 7)), "bias": rng.normal(size=(4, 7))}
    params = {k: v.astype(np.float32) for k, v in params.items()}
    found = probe_scores.logits(params, x)
    for head in range(4):
        expected = x[head // 2] @ params["kernel"][head] + params["bias"][head]
        np.testing.assert_allclose(found[head], expected, atol=1e-5)


def test_sweep_run_writes_its_results(tmp_path):
    """Every head logged, nearest neighbours for every view, the best named."""
    config = chain.load("probe", "mesh.data=1", *SWEEP[:1], "knn.neighbours=(1,3)")
    registry.train(config, tmp_path)
    found = json.loads((tmp_path / probe_scores.RESULT_NAME).read_text())
    top1 = {k: v["top1"] for k, v in found["heads"].items()}
    assert set(top1) == {"b1", "b2"} and found["best"] == max(top1, key=top1.get)
    logged = logs.last_scores(tmp_path, "top1_")
    assert logged == {f"top1_{name}": value for name, value in top1.items()}
    head = dict(block=1, t=10, noisy=False, lr=6.4, optimizer="lars", top1=top1["b1"])
    assert found["heads"]["b1"] == head | {"features": "encoder"}
    assert set(found["knn"]) == {f"knn{k}_{view}" for k in (1, 3) for view in top1}
    assert all(0 <= value <= 1 for value in found["knn"].values())


@pytest.mark.parametrize("token", probe_heads.TOKENS)
def test_class_token_and_patches_of_published_encoders(token):
    config = chain.load("probe", f"pool.token={token}", "pool.norm=True")
    sizes = dict(image_size=32, patch_size=16, hidden_size=16, depth=2, num_heads=2)
    with config.unlocked():
        config.encoder.name = "mae"
        config.encoder.sizes = sizes | dict(intermediate_size=32)
    params = frozen.load_encoder(config.encoder, ".")
    encoder_def, _ = frozen.encoder(config.encoder)
    images = inputs.examples(config.data, "train", 2)
    found = jax.jit(
        lambda params, images: probe_heads.extract(
            config, encoder_def, {"encoder": params}, images, None, None
        )
    )(params, images)["encoder"]
    assert found.shape == (1, 2, 16)
    encoder = nnx.merge(encoder_def, params)
    x = images / np.float32(255) - np.asarray(encoder.image_mean, np.float32)
    x = x / np.asarray(encoder.image_std, np.float32)
    read = jax.jit(lambda e, x: (jnp.mean(e(x), axis=1), e.class_token(x)))
    expected = read(encoder, x)[token == "cls"]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_neighbours_vote_as_written_down():
    """Against the definition in NumPy, whatever the size of the chunks."""
    rng = np.random.default_rng(0)
    train, labels = rng.normal(size=(60, 6)), rng.integers(0, 4, 60)
    queries, truth = rng.normal(size=(9, 6)), rng.integers(0, 4, 9)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, train)]
    cosines = unit[0] @ unit[1].T
    expected = {}
    for k in (1, 5):
        nearest = np.argsort(-cosines, axis=1)[:, :k]
        votes = np.zeros((9, 4))
        for i, row in enumerate(nearest):
            for j in row:
                votes[i, labels[j]] += np.exp(cosines[i, j] / 0.07)
        expected[k] = np.mean(votes.argmax(axis=1) == truth)
    for size in (60, 16):
        search = neighbours.Neighbours(queries, 5)
        for start in range(0, 60, size):
            part, own = train[start : start + size], labels[start : start + size]
            pad = size - len(part)
            mask = np.arange(size) < len(part)
            search.add(np.pad(part, ((0, pad), (0, 0))), np.pad(own, (0, pad)), mask)
        assert search.seen == 60
        assert search.top1(truth, 4, (1, 5)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="k = .7. are not within 1 and 5"):
        search.top1(truth, 4, (1, 7))
    with pytest.raises(ValueError, match=r"must be \(n, 6\), got \(2, 3\)"):
        search.add(np.zeros((2, 3)), np.zeros(2))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.blocks=(3,)", "sweep.blocks: .3. are not within 1 and .* = 2"),
        ("sweep.times=(1000,)", "sweep.times: .1000. are not within 0 and 999"),
        ("sweep.lrs=(0.0,)", "sweep.lrs must be positive"),
        ("pool.token=clss", "pool.token 'clss'. Did you mean 'cls'"),
        ("pool.token=cls", "encoders 'ldae' have no class token"),
        ("data.image_size=16", "data.image_size = 16, but the encoder takes .* 32"),
    ],
)
def test_wrong_probes_are_refused_by_shape_alone(override, message):
    with pytest.raises(configs.ConfigError, match=message):
        probe.design(chain.load("probe", override))


def test_a_probe_follows_its_run(tmp_path):
    """Sizes, tokenizer, row and tier; what a user chooses stays; then it is loaded."""
    run = configs.load_config(f"{chain.ROOT}/configs/ldae.py:t1_dit_baseline_smoke")
    configs.save_config(run, tmp_path / "run" / "config.json")
    config = chain.load("probe", "encoder.weights=../run", "sweep.blocks=(1,2)")
    config.encoder.sizes.time_index = 77
    found = following.follow(config, tmp_path / "probe")
    sizes = ldae_runs.sizes(run) | {"depth": 2}
    assert sizes["tokenizer"] in tokenizers.CONVOLUTIONAL
    known = found.encoder.sizes.to_dict()
    assert {k: known[k] for k in sizes} == sizes and known["time_index"] == 77
    assert (found.row, found.tier) == ("t1_dit_baseline", "smoke")
    probe.design(found)  # It fits together.
    assert following.follow(found, tmp_path / "probe").to_dict() == found.to_dict()
    baseline = configs.load_config(f"{chain.ROOT}/configs/mae.py:smoke")
    configs.save_config(baseline, tmp_path / "mae" / "config.json")
    config.encoder.weights, config.sweep.blocks = "../mae", ()
    config.pool.update(token="cls", norm=True)
    other = following.follow(config, tmp_path / "probe")
    assert other.encoder.name == "mae" and other.encoder.weights == "../mae"
    assert other.encoder.sizes.depth == baseline.model.depth
    probe.design(other)
    config.encoder.weights, config.encoder.match = "../run", False
    assert following.follow(config, tmp_path / "probe") is config
    with pytest.raises(configs.ConfigError, match="do not fit .*tokenizer = pca, the"):
        frozen.load_encoder(config.encoder, tmp_path / "probe")
    with pytest.raises(checkpoints.CheckpointError, match="no checkpoint"):
        frozen.load_encoder(found.encoder, tmp_path / "probe")


def test_data_without_labels_are_refused(tmp_path):
    config = chain.load("probe")
    config.data.update(source="flat_folder", path=str(tmp_path))
    inputs.check_classes(chain.load("probe").data, 10)
    with pytest.raises(configs.ConfigError, match="num_classes = 3, but .* 10"):
        inputs.check_classes(chain.load("probe").data, 3)
    image = inputs.examples(chain.load("probe").data, "train", 1)[0]
    folder = tmp_path / "train"
    folder.mkdir()
    Image.fromarray(image).save(folder / "a.png")
    with pytest.raises(configs.ConfigError, match="needs labels"):
        inputs.check_classes(config.data, 10)
