"""Mixed precision, read off the jaxpr of whole training steps in bfloat16.

Parameters, their average, moments, gradients, losses and softmax are float32; the
products of the trained network are bfloat16, but for the exceptions named below.
"""

import chain
import jax
import jax.numpy as jnp
import pytest

from rae_jax.trainers import registry
from rae_jax.training import programs, state

DEPTH = 5  # Blocks of the trained network; the frozen encoder has fewer.
# Products of one block: q/k/v, logits, values, projection, two of the MLP, modulation.
PRODUCTS = {"ldae": 7, "rae_decoder": 6, "latent_diffusion": 7}
# Kernels of the trained networks whose products are float32.
FLOAT32 = {
    "ldae": {"t_embedder.fc1.kernel", "t_embedder.fc2.kernel"},
    "rae_decoder": set(),
    "latent_diffusion": set(),
}
TRAINERS = pytest.mark.parametrize("name", PRODUCTS)


def make_design(name: str) -> programs.Design:
    """Widths and depths that no frozen network has, so that shapes name kernels."""
    config = chain.load(name)
    config.model.dtype = "bfloat16"
    if name == "latent_diffusion":
        config.model.update(hidden_size=(40, 48), depth=(DEPTH, DEPTH + 1))
    else:
        config.model.update(hidden_size=40, depth=DEPTH)
    return registry.design(config)


@pytest.fixture(scope="module")
def traced():
    """Design, state shapes, gradient shapes and jaxpr of each trainer's step."""
    found = {}
    for name in PRODUCTS:
        design, grads = make_design(name), []
        key = jax.eval_shape(lambda: jax.random.key(0))
        shapes = jax.eval_shape(design.init, key)
        with pytest.MonkeyPatch.context() as patch:
            original = state.gradients

            def record(*args, original=original, grads=grads):
                result = original(*args)
                grads.append(result)
                return result

            patch.setattr(state, "gradients", record)
            args = (shapes, design.frozen, design.batch, key)
            jaxpr = jax.make_jaxpr(design.step)(*args)
        found[name] = design, shapes, grads[0], jaxpr.jaxpr
    return found


def equations(jaxpr, inside=()):
    """Yields every equation and the scans (length, reverse) that it lies in."""
    for eqn in jaxpr.eqns:
        yield eqn, inside
        scans = inside
        if eqn.primitive.name == "scan":
            scans = (*inside, (eqn.params["length"], eqn.params["reverse"]))
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, scans)


def operands(eqn) -> tuple[str, ...]:
    return tuple(v.aval.dtype.name for v in eqn.invars)


def dots(jaxpr, length=None, reverse=False) -> list:
    """Returns the products within scans of a length, or (None) outside of scans."""
    wanted = () if length is None else ((length, reverse),)
    return [
        eqn
        for eqn, scans in equations(jaxpr)
        if eqn.primitive.name == "dot_general" and scans == wanted
    ]


def stacks(name: str) -> list[int]:
    return [DEPTH, DEPTH + 1] if name == "latent_diffusion" else [DEPTH]


@TRAINERS
def test_state_gradients_and_losses_are_float32(traced, name):
    design, shapes, (grads, metrics), jaxpr = traced[name]
    for x in jax.tree.leaves((shapes, grads, metrics)):
        assert x.dtype == jnp.float32 or jnp.issubdtype(x.dtype, jnp.integer)
    assert jax.tree.structure(grads) == jax.tree.structure(shapes.params)
    new_state, metrics = design.abstract_step()
    assert "loss" in metrics and "grad_norm" in metrics
    for x in jax.tree.leaves(metrics):
        assert x.dtype == jnp.float32
    before, after = (
        jax.tree.map(lambda x: (x.shape, x.dtype.name), t) for t in (shapes, new_state)
    )
    assert before == after


@TRAINERS
def test_products_of_the_blocks_are_bfloat16(traced, name):
    jaxpr = traced[name][-1]
    for depth in stacks(name):
        forward = dots(jaxpr, depth)
        assert len(forward) == PRODUCTS[name]
        assert {operands(e) for e in forward} == {("bfloat16",) * 2}
        # Recomputed, and twice as many gradients.
        backward = dots(jaxpr, depth, reverse=True)
        assert len(backward) >= 2 * PRODUCTS[name]
        assert {operands(e) for e in backward} == {("bfloat16",) * 2}


@TRAINERS
def test_products_around_the_blocks_are_bfloat16_with_named_exceptions(traced, name):
    """Kernels outside the stacks are recognised by their shape, cast or not."""
    _, shapes, _, jaxpr = traced[name]
    leaves = jax.tree.leaves_with_path(shapes.params)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): x.shape
        for path, x in leaves
        if "blocks" not in jax.tree_util.keystr(path)
    }
    kernels = {k: shape for k, shape in flat.items() if k.endswith("kernel")}
    found = {k: set() for k in kernels}
    for eqn in dots(jaxpr):
        for key, shape in kernels.items():
            if eqn.invars[1].aval.shape == shape:
                found[key].add(operands(eqn))
    for key, types in found.items():
        expected = "float32" if key in FLOAT32[name] else "bfloat16"
        assert types == {(expected,) * 2}, key
    assert FLOAT32[name] <= set(kernels)


@TRAINERS
def test_softmax_is_float32(traced, name):
    """Exponentials of (.., n, n); those of (b, n, d) are in the gradient of GELU."""
    jaxpr = traced[name][-1]
    found = [
        (scans, operands(eqn))
        for eqn, scans in equations(jaxpr)
        if eqn.primitive.name == "exp" and eqn.outvars[0].aval.ndim > 3
    ]
    assert {types for _, types in found} == {("float32",)}
    for depth in stacks(name):
        # In the forward pass, and recomputed in the backward pass.
        for reverse in (False, True):
            assert sum(s == ((depth, reverse),) for s, _ in found) == 1
