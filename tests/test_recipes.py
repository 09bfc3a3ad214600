"""Prediction of x, early heads, alignment with an encoder, patches of latents."""

import chain
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from rae_jax import config as configs
from rae_jax.convert import sources
from rae_jax.diffusion import guidance, paths, velocities
from rae_jax.losses import alignment, flow_matching
from rae_jax.models import dit, dit_dh
from rae_jax.trainers import registry, sampling
from rae_jax.training import logs

SHAPE = dict(input_size=4, in_channels=3, num_classes=10, remat="none")
DIT = SHAPE | dict(hidden_size=24, depth=4, num_heads=2)
DIT_DH = SHAPE | dict(hidden_size=(24, 48), depth=(4, 1), num_heads=(2, 4))
BOTH = pytest.mark.parametrize(
    "cls, sizes", [(dit.DiT, DIT), (dit_dh.DiTDH, DIT_DH)], ids=["dit", "dit_dh"]
)

outputs = jax.jit(lambda model, *inputs: model.outputs(*inputs))


def inputs(batch=2, size=4, seed=0):
    rng = np.random.default_rng(seed)
    x_t = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    t = rng.uniform(0.1, 0.9, batch).astype(np.float32)
    return x_t, t, np.arange(batch, dtype=np.int32)


def close(actual, desired, rtol=1e-5):
    desired = np.asarray(desired)
    np.testing.assert_allclose(actual, desired, atol=rtol * np.abs(desired).max())


# ---- Prediction of x


@BOTH
def test_prediction_of_x_becomes_a_velocity(cls, sizes):
    """The same weights once give v and once x; v is (x_t - x) / max(t, 0.05)."""
    x_t, _, y = inputs()
    for t in ([0.3, 0.8], [0.01, 0.05]):
        t = np.float32(t)
        x = networks.call(networks.drawn(cls, **sizes), x_t, t, y)
        v = networks.call(networks.drawn(cls, **sizes, prediction="x"), x_t, t, y)
        close(v, (x_t - x) / np.maximum(t, 0.05)[:, None, None, None])


@pytest.mark.parametrize("shift", [1.0, 0.02])
def test_perfect_prediction_of_x_costs_nothing(shift):
    """Also where most times are below the bound of the divisor (shift 0.02)."""
    x = inputs(8)[0]
    options = dict(shift=shift, min_time=paths.MIN_TIME_OF_X)

    def network(x_t, t, y):
        return paths.v_from_x(x, x_t, t, paths.MIN_TIME_OF_X)

    args = (x, np.zeros(8, np.int32), jax.random.key(0))
    loss, _ = flow_matching.flow_matching_loss(network, *args, **options)
    assert loss < 1e-10


def test_unknown_prediction():
    with pytest.raises(ValueError, match="prediction 'eps'"):
        networks.drawn(dit.DiT, **DIT, prediction="eps")


# ---- Early heads and projections


def shallow(model, depth):
    """The first blocks of a DiT with its early head as the last layer."""
    small = networks.drawn(dit.DiT, **DIT | dict(depth=depth))
    for name in ("x_embedder", "t_embedder", "y_embedder", "pos_embed"):
        setattr(small, name, getattr(model, name))
    small.blocks.block = jax.tree.map(lambda p: p[:depth], model.blocks.block)
    small.final_layer = model.early_layer
    return small


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_early_head_is_a_shallower_network(prediction):
    model = networks.drawn(dit.DiT, **DIT, early_depth=2, prediction=prediction)
    small = shallow(model, 2)
    small.prediction = prediction
    found = outputs(model, *inputs())
    close(found.early, networks.call(small, *inputs()))
    close(found.velocity, networks.call(model, *inputs()))
    assert found.aligned is None


@BOTH
def test_readers_leave_the_velocity_as_it_is(cls, sizes):
    plain = networks.drawn(cls, **sizes)
    model = networks.drawn(cls, **sizes, early_depth=1, align_depth=3, align_dim=5)
    for name, value in vars(model).items():
        if isinstance(value, (nnx.Module, nnx.Param)) and getattr(plain, name):
            setattr(plain, name, value)
    found = outputs(model, *inputs())
    close(found.velocity, networks.call(plain, *inputs()))
    assert found.early.shape == found.velocity.shape
    assert found.aligned.shape == (2, 16, 5)


@BOTH
def test_readers_see_no_later_block(cls, sizes):
    model = networks.drawn(cls, **sizes, early_depth=1, align_depth=3, align_dim=5)
    leaves, treedef = jax.tree.flatten(model)

    @jax.jit
    def gradients(leaves):
        def read(name):
            def total(leaves):
                model = jax.tree.unflatten(treedef, leaves)
                return jnp.sum(getattr(model.outputs(*inputs()), name) ** 2)

            grads = jax.tree.unflatten(treedef, jax.grad(total)(leaves))
            kernel = grads.blocks.block.attn.qkv.kernel[...]
            return jnp.abs(kernel).max(axis=(1, 2))

        return {name: read(name) for name in ("early", "aligned", "velocity")}

    found = jax.tree.map(lambda g: (g > 0).tolist(), gradients(leaves))
    assert found["early"] == [True, False, False, False]
    assert found["aligned"] == [True, True, True, False]
    assert found["velocity"] == [True] * 4


def test_readers_that_cannot_be():
    for options, message in (
        (dict(early_depth=4), "early_depth must be 0"),
        (dict(align_depth=-1), "align_depth must be 0"),
        (dict(align_depth=2), "needs align_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            networks.drawn(dit.DiT, **DIT, **options)


def test_early_error_is_added_with_its_weight():
    x = inputs(4)[0]
    args = (x, np.zeros(4, np.int32), jax.random.key(1))
    both = lambda x_t, t, y: velocities.Outputs(0 * x_t, 2 * x_t)  # noqa: E731

    def loss(network, **options):
        return flow_matching.flow_matching_loss(network, *args, shift=1.0, **options)

    main, _ = loss(lambda x_t, t, y: 0 * x_t)
    early, _ = loss(lambda x_t, t, y: 2 * x_t)
    total, metrics = loss(both, early_weight=0.5)
    close(total, main + 0.5 * early)
    close([metrics["loss_main"], metrics["loss_early"]], [main, early])


# ---- Alignment


def test_alignment_is_minus_the_mean_cosine():
    a, b = (np.random.default_rng(i).normal(size=(2, 5, 7)) for i in range(2))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    expected = -np.mean(np.sum(a * b, -1) / norms)
    close(alignment.alignment_loss(jnp.float32(a), jnp.float32(b)), expected)
    close(alignment.alignment_loss(jnp.float32(7 * a), jnp.float32(a)), -1)
    grads = jax.grad(alignment.alignment_loss, argnums=(0, 1))(
        jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))
    )
    assert np.isfinite(grads[0]).all() and not np.any(grads[1])
    with pytest.raises(ValueError, match=r"\(2, 5, 7\).*\(2, 4, 7\)"):
        alignment.alignment_loss(jnp.zeros((2, 5, 7)), jnp.zeros((2, 4, 7)))


def align(target, **sizes):
    config = chain.load("latent_diffusion")
    config.repa.update(weight=0.5, depth=1, target=target)
    config.model.depth = (3, 1)
    with config.unlocked():
        config.repa.encoder = chain.encoder(**sizes)
    return config


@pytest.mark.parametrize("target, width", [("latent", 32), ("encoder", 48)])
def test_alignment_is_learnt(target, width, tmp_path):
    """With the latents themselves, and with another encoder's features."""
    config = align(target, hidden_size=48)
    config.num_steps = 40
    config.every.update(evaluate=0, log=1)
    config.optimizer.peak_lr = 3e-3
    config.mesh.data = 1
    state = registry.train(config, tmp_path)
    assert state.params["projection"]["fc3"]["kernel"].shape[-1] == width
    losses = [r["loss_align"] for r in logs.read_metrics(tmp_path) if "loss" in r]
    assert min(losses) >= -1 and losses[-1] < losses[0] - 0.2


def test_alignment_with_other_grids_is_refused():
    config = align("encoder", image_size=64)
    with pytest.raises(configs.ConfigError, match="8 x 8 features.*4 x 4 tokens"):
        registry.design(config)
    with pytest.raises(configs.ConfigError, match="repa.target 'latents'"):
        registry.design(align("latents"))


# ---- Internal guidance


def plan(**block):
    options = dict(shift=1.0, network=dit_dh.DiTDH, num_classes=10)
    options |= {"early_depth": block.pop("early_depth", 2)}
    return sampling.make_plan(dict(num_points=5, **block), **options)


def draw(plan, model, scale):
    labels = np.arange(2, dtype=np.int32)
    index = np.arange(2, dtype=np.int32)
    draw = jax.jit(
        lambda model: plan.draw({"dit": model}, scale, (4, 4, 3), 0, index, labels).x
    )
    return draw(model)


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_internal_guidance_extrapolates_from_the_early_head(prediction):
    model = networks.drawn(dit_dh.DiTDH, **DIT_DH, early_depth=2, prediction=prediction)
    x_t, t, y = inputs()
    main, early, _ = outputs(model, x_t, t, y)
    expected = early + 1.7 * (main - early)
    found = plan(guidance="internal")._guided({"dit": model}, 1.7)(x_t, t, y)
    close(found, expected)
    # Steps that share the trunk have both heads, too.
    shared = plan(guidance="internal", name="euler_shared", options="period=1")
    close(draw(shared, model, 1.7), draw(plan(guidance="internal"), model, 1.7), 1e-4)
    # Without guidance nothing differs from the plain samples.
    plain = draw(plan(), model, 1.0)
    close(draw(plan(guidance="internal"), model, 1.0), plain)
    assert np.abs(draw(plan(guidance="internal"), model, 1.7) - plain).max() > 1e-3


def test_internal_guidance_with_an_interval():
    model = networks.drawn(dit_dh.DiTDH, **DIT_DH, early_depth=2)
    x_t, _, y = inputs()
    t = np.float32([0.05, 0.5])
    main, early, _ = outputs(model, x_t, t, y)
    both = lambda *args: model.outputs(*args)[:2]  # noqa: E731
    found = guidance.internal_guidance(both, 1.7, (0.1, 1.0))(x_t, t, y)
    close(found[0], main[0])
    close(found[1], early[1] + 1.7 * (main[1] - early[1]))


def test_internal_guidance_needs_an_early_head():
    with pytest.raises(configs.ConfigError, match="model.early_depth"):
        plan(guidance="internal", early_depth=0)
    config = chain.load("latent_diffusion", "sampling.guidance=internal")
    with pytest.raises(configs.ConfigError, match="early head"):
        registry.design(config)


# ---- Patches of latents, files


def test_patches_are_channels_of_a_smaller_latent():
    """A network with patches of 2 is one without on the latents' blocks of 2 x 2."""
    small = DIT_DH | dict(input_size=4, in_channels=12)
    large = DIT_DH | dict(input_size=8, in_channels=3, patch_size=2)
    x_t, t, y = inputs(size=8)
    blocks = x_t.reshape(2, 4, 2, 4, 2, 3).swapaxes(2, 3).reshape(2, 4, 4, 12)
    v = networks.call(networks.drawn(dit_dh.DiTDH, **large), x_t, t, y)
    found = networks.call(networks.drawn(dit_dh.DiTDH, **small), blocks, t, y)
    found = found.reshape(2, 4, 4, 2, 2, 3).swapaxes(2, 3).reshape(2, 8, 8, 3)
    close(v, found)
    with pytest.raises(ValueError, match="not a multiple of patch_size 3"):
        networks.drawn(dit_dh.DiTDH, **large | dict(patch_size=3))


@BOTH
def test_official_layout_has_names_for_all(cls, sizes, tmp_path):
    readers = dict(early_depth=2, align_depth=1, align_dim=5)
    arguments = sizes | readers | dict(patch_size=2, prediction="x")
    model = networks.drawn(cls, **arguments)
    model.save_pretrained(tmp_path, layout="official")
    names = sources.open_tensors(tmp_path / "model.pt").shapes
    assert names["base_final_layer.linear.weight"] == (12, 24)
    assert names["repa_projector.4.weight"] == (5, 2048)
    given = dict(early_depth=2, align_depth=1, prediction="x", remat="none")
    again = cls.from_pretrained(tmp_path / "model.pt", **given)
    x, y = (jax.tree.leaves(m) for m in (model, again))
    assert all(np.array_equal(a, b) for a, b in zip(x, y, strict=True))
    close(networks.call(again, *inputs()), networks.call(model, *inputs()), rtol=1e-6)
    with pytest.raises(ValueError, match="Give early_depth"):
        cls.from_pretrained(tmp_path / "model.pt")
