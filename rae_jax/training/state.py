"""What a run carries from step to step, and one gradient step on it."""

from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rae_jax.training import divergence, optimizers

Params = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[[nnx.Module, Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
GradFn = Callable[[Params, Batch, jax.Array], tuple[Params, Metrics]]


@flax.struct.dataclass
class TrainState:
    """All that a run needs to resume, as plain pytrees of arrays."""

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: optax.OptState

    def apply_gradients(
        self,
        grads: Params,
        tx: optax.GradientTransformation,
        ema_decay: float,
        loss: jax.Array | None = None,
    ) -> Self:
        """Returns the state after one optimiser step and one EMA update.

        `loss` is for optimisers that watch it, see `optimizers.guarded`.
        """
        tx = optax.with_extra_args_support(tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, value=loss)
        params = optax.apply_updates(self.params, updates)
        ema_params = update_ema(self.ema_params, params, ema_decay)
        return self.replace(
            step=self.step + 1,
            params=params,
            ema_params=ema_params,
            opt_state=opt_state,
        )


def update_ema(ema_params: Params, params: Params, decay: float) -> Params:
    """Moves the average towards the parameters.

    Written as ema + (1 - decay) (p - ema): parameters that never change keep
    their exact bits, which decay * ema + (1 - decay) * p does not promise.
    """
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema_params, params)


def create_state(
    make_model: Callable[..., nnx.Module],
    tx: optax.GradientTransformation,
    key: jax.Array,
) -> TrainState:
    """Initialises a state; call it under `jax.jit` with sharded outputs."""
    params = param_dict(make_model(rngs=nnx.Rngs(key)))
    ema_params = jax.tree.map(jnp.copy, params)  # Donation forbids shared buffers.
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, tx.init(params))


def param_dict(model: nnx.Module) -> Params:
    """Returns the parameters of a module as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def abstract_model(make_model: Callable[..., nnx.Module]) -> nnx.GraphDef:
    """Returns the static part of a module without allocating its parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0))))


def make_step(
    graphdef: nnx.GraphDef,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulate: int = 1,
    schedule: optax.Schedule | None = None,
) -> Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Builds the training step of one model and one loss; the loop compiles it.

    Args:
        graphdef: Static part of the trained model.
        loss_fn: Called as loss_fn(model, frozen, batch, key).
        tx: Optimiser.
        ema_decay: Decay of the parameter average.
        accumulate: Number of equal parts of the batch whose gradients are
            averaged before the update, to fit a large batch into memory.
        schedule: If given, its value is logged as `lr`.
    """

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)

        def loss_of(params, part, part_key):
            return loss_fn(nnx.merge(graphdef, params), frozen, part, part_key)

        grads, metrics = gradients(loss_of, state.params, batch, key, accumulate)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics[divergence.NORMS] = divergence.group_norms(grads)
        if schedule is not None:
            metrics["lr"] = learning_rate(schedule, state.step, state.opt_state)
        state = state.apply_gradients(grads, tx, ema_decay, metrics.get("loss"))
        return state, metrics | optimizers.guard_metrics(state.opt_state)

    return step


def learning_rate(
    schedule: optax.Schedule, step: jax.Array, opt_state: optax.OptState
) -> jax.Array:
    """Returns the rate of the next update, float32."""
    rate = schedule(optimizers.num_updates(step, opt_state))
    return jnp.asarray(rate, jnp.float32)


def gradients(
    loss_of: Callable[..., tuple[jax.Array, Metrics]],
    params: Params,
    batch: Batch,
    key: jax.Array,
    accumulate: int = 1,
) -> tuple[Params, Metrics]:
    """Returns mean gradients and metrics of a batch, taken in `accumulate` parts."""
    grad_fn = jax.grad(loss_of, has_aux=True)
    return mean_of_parts(grad_fn, params, batch, key, accumulate)


def mean_of_parts(
    grad_fn: GradFn, params: Params, batch: Batch, key: jax.Array, accumulate: int
) -> tuple[Params, Metrics]:
    """Returns the mean of what `grad_fn` returns for `accumulate` parts of a batch.

    Args:
        grad_fn: Called as grad_fn(params, part, key), with a key for each part.
        params: Parameters.
        batch: Arrays with the batch first.
        key: Randomness.
        accumulate: Number of equal parts, one after the other.
    """
    if accumulate == 1:
        return grad_fn(params, batch, key)

    def body(total, index_and_part):
        index, part = index_and_part
        new = grad_fn(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, new), None

    parts = jax.tree.map(lambda x: split_parts(x, accumulate), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(grad_fn, params, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(accumulate), parts))
    return jax.tree.map(lambda x: x / accumulate, total)


def split_parts(x: jax.Array, count: int) -> jax.Array:
    """Splits (b, ...) into (count, b / count, ...).

    Parts are strided: each keeps an even share of every device's rows.
    """
    parts = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return jnp.moveaxis(parts, 1, 0)


def join_parts(parts: jax.Array) -> jax.Array:
    """Inverts `split_parts`."""
    return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])
