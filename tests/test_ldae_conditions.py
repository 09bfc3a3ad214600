"""l-DAE with classes and learned variance, and configs that cannot be."""

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax import config as configs
from rae_jax.models import ldae as models
from rae_jax.trainers import ldae
from rae_jax.training import sharding, state

SIZES = dict(grid=2, in_features=6, hidden_size=16, depth=2, num_heads=2)
CONFIG = chain.ROOT / "configs" / "ldae.py"
X = np.random.default_rng(0).standard_normal((2, 4, 6), np.float32)
T = jnp.asarray([0, 700])


def load(variant, *overrides):
    return configs.load_config(
        f"{CONFIG}:{variant}", [f"--config.{text}" for text in overrides]
    )


def perturbed(**changes):
    """A network with noise on all parameters; a new one predicts zero."""
    net = models.LDAE(**SIZES | dict(out_features=6) | changes, rngs=nnx.Rngs(0))
    graphdef, params = nnx.graphdef(net), state.param_dict(net)
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    leaves = [p + 0.2 * rng.standard_normal(p.shape, np.float32) for p in leaves]
    return nnx.merge(graphdef, treedef.unflatten(leaves))


call = jax.jit(lambda net, *args: net(*args))


def test_classes_condition_and_none_is_one_of_them():
    net = perturbed(num_classes=3)
    none = call(net, X, T)
    np.testing.assert_array_equal(call(net, X, T, jnp.asarray([3, 3])), none)
    some = call(net, X, T, jnp.asarray([0, 3]))
    assert np.abs(some[0] - none[0]).max() > 1e-3
    np.testing.assert_allclose(some[1], none[1], rtol=1e-5, atol=1e-6)
    assert net.y_embedder.table.shape == (4, 4)  # As wide as the time's embedding.
    features = net.features(X, T, 1, jnp.asarray([0, 3]))
    found = net.block_features(X, T, [0], jnp.asarray([0, 3]))[0]
    np.testing.assert_allclose(found, features, rtol=1e-6)
    assert np.abs(features - net.features(X, T, 1))[0].max() > 1e-3
    plain = models.LDAE(**SIZES, out_features=6, rngs=nnx.Rngs(0))
    assert "y_embedder" not in state.param_dict(plain)


def test_a_learned_variance_doubles_the_output():
    net = perturbed(learn_sigma=True)
    assert call(net, X, T).shape == (2, 4, 12)
    encoder = models.LDAE(**SIZES, out_features=0, learn_sigma=True, rngs=nnx.Rngs(0))
    assert encoder.final_layer is None


@pytest.mark.parametrize(("rate", "rows"), [(0.0, [1, 5]), (1.0, [10])])
def test_labels_are_dropped_for_the_loss(rate, rows):
    """Only the classes that the network was called with have a gradient."""
    config = load("x_ppca_cls_smoke", f"model.class_dropout_prob={rate}")
    design = ldae.design(config)
    tokenizer = jax.tree.map(lambda s: jnp.ones(s.shape), design.frozen)
    images = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray([1, 5])}
    graphdef = state.abstract_model(ldae.make_model(config))
    params = jax.jit(design.init)(jax.random.key(0)).params
    params = jax.tree.map(lambda p: p + 0.1, params)

    @jax.jit
    @jax.grad
    def gradient(params):
        model = nnx.merge(graphdef, params)
        return ldae.make_loss(config)(model, tokenizer, batch, jax.random.key(0))[0]

    found = np.abs(gradient(params)["y_embedder"]["table"]).max(axis=1)
    assert np.flatnonzero(found > 0).tolist() == rows


@pytest.mark.parametrize(
    ("variant", "overrides", "message"),
    [
        (
            "t1_dit_baseline",
            ["data.source=flat_folder"],
            "num_classes = 1000 needs labels, which images of the source 'flat_folder'",
        ),
        ("smoke", ["encoder_depth=4"], "encoder_depth = 4 is not within 1 and .* 3"),
        ("smoke", ["tokenizer.latent_dim=193"], "latent_dim = 193"),
        ("smoke", ["data.image_size=36"], "36 is not a multiple"),
        ("smoke", ["noise.schedule=linear"], "schedule 'linear'"),
        ("t3_image_in_smoke", ["tokenizer.name=patch_ae"], "'patch_ae'"),
        ("t3_orig_image", ["model.learn_sigma=true"], "learn_sigma"),
    ],
)
def test_configs_that_cannot_be_fail_at_construction(variant, overrides, message):
    config = load(variant, *overrides)
    if "weights" in config.tokenizer and config.tokenizer.name == "patch_ae":
        config.tokenizer.weights = "random"
    with pytest.raises(configs.ConfigError, match=message):
        ldae.design(config)


def test_classes_that_the_data_lacks(tmp_path):
    mesh = sharding.make_mesh(1)
    config = load("x_ppca_cls_smoke", "model.num_classes=4")
    with pytest.raises(configs.ConfigError, match="= 4, but the data has 10 classes"):
        ldae.build(config, tmp_path, mesh)
    folder = tmp_path / "images" / "all"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"not looked at")
    config.data.source, config.data.path = "class_folder", str(folder.parent)
    with pytest.raises(configs.ConfigError, match="have one label: set it to 0"):
        ldae.build(config, tmp_path, mesh)
    assert not (tmp_path / "tokenizer.npz").exists()
