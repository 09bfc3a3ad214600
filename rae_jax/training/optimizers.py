"""Optimisers and learning-rate schedules from `config.optimizer`, and their guard."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from rae_jax import config as configs

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "lars", "sgd", "muon")
TRUST = 1e-3  # Of LARS, as linear probes have it since MoCo v3.
GUARD_WINDOW = 100  # Steps that a guard's running means look back.
GUARD_MIN_STEPS = 20  # Before as many no value is called a spike.


def make_schedule(
    *,
    peak_lr: float,
    final_lr: float,
    schedule: str,
    warmup_steps: int,
    decay_end_step: int,
    warmup_from_zero: bool = True,
) -> optax.Schedule:
    """Returns step index -> learning rate, as the official code defines it.

    Step k of the warm-up uses peak (k + 1) / warmup_steps, or peak throughout
    when `warmup_from_zero` is false; then the rate falls to `final_lr` at
    `decay_end_step` and stays there.

    Raises:
        ValueError: For an unknown schedule name or a decay that ends in the warm-up.
    """
    if schedule not in SCHEDULES:
        raise ValueError(configs.suggest(schedule, SCHEDULES, "schedule"))
    if decay_end_step <= warmup_steps and schedule != "constant":
        raise ValueError(
            f"The decay ends at step {decay_end_step}, within the {warmup_steps} "
            "steps of warm-up. Lower optimizer.warmup_steps or train longer."
        )
    decay_steps = decay_end_step - warmup_steps
    after = {
        "constant": lambda: optax.constant_schedule(peak_lr),
        "linear": lambda: optax.linear_schedule(peak_lr, final_lr, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(
            peak_lr, decay_steps, final_lr / peak_lr
        ),
    }[schedule]()
    if warmup_steps == 0:
        return after
    start = peak_lr / warmup_steps if warmup_from_zero else peak_lr
    warmup = optax.linear_schedule(start, peak_lr, warmup_steps - 1)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    config: ConfigDict,
    num_steps: int,
    guard: ConfigDict | None = None,
    decays: Callable[[Any], Any] | None = None,
    rates: Callable[[Any], Any] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optax chain of `config.optimizer` and its schedule.

    Weight decay acts on `matrices` only, or on what `decays` marks. "muon"
    orthogonalises the updates of the blocks' kernels and leaves the rest to Nadam.
    `decay_end_step` 0 means the end of the run. `rates` maps parameters to factors of
    their rates, arrays that broadcast. A `guard` that is switched on wraps the chain,
    see `guarded`.

    Raises:
        ValueError: For an unknown optimiser or schedule.
    """
    decays = decays or matrices
    schedule = make_schedule(
        peak_lr=config.peak_lr,
        final_lr=config.final_lr,
        schedule=config.schedule,
        warmup_steps=config.warmup_steps,
        warmup_from_zero=config.warmup_from_zero,
        decay_end_step=config.decay_end_step or num_steps,
    )
    if config.name == "adamw":
        tx = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        )
    elif config.name in ("lars", "sgd"):
        tx = _with_momentum(config, schedule, decays)
    elif config.name == "muon":
        tx = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=block_kernels,
        )
    else:
        raise ValueError(configs.suggest(config.name, OPTIMIZERS, "optimizer"))
    if config.clip_norm > 0:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    if rates is not None:
        tx = optax.chain(tx, scaled(rates))
    if guard is not None and (guard.spike_factor or guard.skip):
        tx = guarded(tx, guard)
    return tx, schedule


def scaled(rates: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Multiplies updates by what `rates` makes of the parameters."""

    def update(updates, params):
        return jax.tree.map(lambda u, rate: u * rate, updates, rates(params))

    return optax.stateless(update)


def layer_rates(params: Any, decay: float) -> Any:
    """Returns factors of rates that fall from the last block to the first.

    Layer-wise decay as MAE fine-tunes with (arXiv:2111.06377, after arXiv:2003.10555):
    of `depth` blocks, block i has decay^(depth - i), embeddings of patches, positions
    and class have decay^(depth + 1), and what comes after the blocks has 1.

    Args:
        params: With an encoder under "encoder", whose blocks are stacked.
        decay: At most 1.
    """
    depth = len(jax.tree.leaves(params["encoder"]["blocks"])[0])

    def rate(path, x):
        names = [getattr(key, "key", None) for key in path]
        if "blocks" in names:
            factors = decay ** jnp.arange(depth, 0, -1, dtype=jnp.float32)
            return factors.reshape((depth,) + (1,) * (x.ndim - 1))
        is_embedding = names[0] == "encoder" and names[1] != "norm"
        return jnp.asarray(decay ** (depth + 1) if is_embedding else 1.0)

    return jax.tree.map_with_path(rate, params)


def _with_momentum(
    config: ConfigDict, schedule: optax.Schedule, decays: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Returns SGD with momentum `b1`, or LARS (arXiv:1708.03888), which is that behind
    trust ratios of matrices.

    The rate multiplies the momentum, as in PyTorch and in MAE's LARS; optax's own
    multiplies the gradients before, which is not the same while the rate changes.
    """
    parts = [optax.add_decayed_weights(config.weight_decay, mask=decays)]
    if config.name == "lars":
        trust = optax.scale_by_trust_ratio(trust_coefficient=TRUST)
        parts.append(optax.masked(trust, matrices))
    parts += [optax.trace(config.b1), optax.scale_by_learning_rate(schedule)]
    return optax.chain(*parts)


class Watch(NamedTuple):
    """Running mean of one positive quantity, and how often it leapt above it."""

    count: jax.Array
    mean: jax.Array
    spikes: jax.Array


class GuardState(NamedTuple):
    """State of `guarded`: that of the optimiser within, and scalars."""

    inner: optax.OptState
    norm: Watch
    loss: Watch
    skipped: jax.Array
    in_a_row: jax.Array


def guarded(
    tx: optax.GradientTransformation, config: ConfigDict
) -> optax.GradientTransformationExtraArgs:
    """Counts spikes of the gradient's norm and of the loss; can leave such steps out.

    A spike is a value that is not finite, or more than `spike_factor` times its
    running mean. Means take spikes in at that bound, so they follow a lasting change.
    With `skip`, a spike of the gradient or a loss that is not finite leaves parameters
    and the state within untouched, its step counter included; other spikes of the
    loss are only counted.

    Args:
        tx: Any optimiser. Its `update` then takes the positive loss as `value`.
        config: Block with spike_factor, 0 for values that are not finite alone, and
            skip.

    Raises:
        ValueError: For a factor that would call usual values spikes.
    """
    if config.spike_factor and config.spike_factor <= 1:
        raise ValueError(
            f"guard.spike_factor must be above 1, or 0, not {config.spike_factor}."
        )
    tx = optax.with_extra_args_support(tx)

    def init(params):
        counters = (jnp.zeros((), jnp.int32) for _ in range(2))
        return GuardState(tx.init(params), _new_watch(), _new_watch(), *counters)

    def update(grads, state, params=None, *, value=None, **extra):
        norm, is_spike = _watch(state.norm, optax.tree.norm(grads), config.spike_factor)
        loss = state.loss
        if value is not None:
            loss, _ = _watch(loss, value, config.spike_factor)
            is_spike |= ~jnp.isfinite(value)  # Whatever its gradient may be.
        updates, inner = tx.update(grads, state.inner, params, value=value, **extra)
        skip = is_spike & config.skip
        updates = jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), updates)
        inner = jax.tree.map(
            lambda old, new: jnp.where(skip, old, new), state.inner, inner
        )
        in_a_row = jnp.where(skip, state.in_a_row + 1, 0)
        return updates, GuardState(inner, norm, loss, state.skipped + skip, in_a_row)

    return optax.GradientTransformationExtraArgs(init, update)


def guard_metrics(opt_state: optax.OptState, suffix: str = "") -> dict[str, jax.Array]:
    """Returns the counts of a guarded optimiser; nothing for any other."""
    if not isinstance(opt_state, GuardState):
        return {}
    counts = {
        "grad_spikes": opt_state.norm.spikes,
        "loss_spikes": opt_state.loss.spikes,
        "skipped_steps": opt_state.skipped,
        "skips_in_a_row": opt_state.in_a_row,
    }
    return {k + suffix: v.astype(jnp.float32) for k, v in counts.items()}


def num_updates(step: jax.Array, opt_state: optax.OptState) -> jax.Array:
    """Returns how many of `step` steps changed parameters: where schedules are."""
    return step - opt_state.skipped if isinstance(opt_state, GuardState) else step


def _new_watch() -> Watch:
    return Watch(*(jnp.zeros((), t) for t in (jnp.int32, jnp.float32, jnp.int32)))


def _watch(watch: Watch, value: jax.Array, factor: float) -> tuple[Watch, jax.Array]:
    """Returns the watch with one more value, and whether that is a spike."""
    judges = (watch.count >= GUARD_MIN_STEPS) & (factor > 0)
    limit = jnp.where(judges, factor * watch.mean, jnp.inf)
    finite = jnp.isfinite(value)
    is_spike = ~finite | (value > limit)
    count = watch.count + finite
    share = 1 / jnp.clip(count, 1, GUARD_WINDOW)
    change = (jnp.minimum(value, limit) - watch.mean) * share
    mean = watch.mean + jnp.where(finite, change, 0.0)
    return Watch(count, mean, watch.spikes + is_spike), is_spike


def matrices(params: Any) -> Any:
    """Marks kernels and tables, not biases, norm scales, positions or class token."""

    def is_matrix(path, x):
        name = jax.tree_util.keystr(path)
        stacked = 1 if "blocks" in name else 0
        vectors = "pos_embed" in name or "cls_token" in name  # Each added as a bias.
        return x.ndim - stacked >= 2 and not vectors

    return jax.tree.map_with_path(is_matrix, params)


def block_kernels(params: Any) -> Any:
    """Marks the kernels (depth, in, out) of scanned blocks as matrices for Muon."""

    def dimensions(path, x):
        if "blocks" not in jax.tree_util.keystr(path) or x.ndim != 3:
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    return jax.tree.map_with_path(dimensions, params)
