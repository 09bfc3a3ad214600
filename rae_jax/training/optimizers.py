"""Optimisers and learning-rate schedules from `config.optimizer`."""

from typing import Any

import jax
import optax
import optax.contrib
from ml_collections import ConfigDict

from rae_jax import config as configs

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "lars", "muon")


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
    config: ConfigDict, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optax chain of `config.optimizer` and its schedule.

    Weight decay acts on matrices only. "muon" orthogonalises the updates of the
    blocks' kernels and leaves the rest to Nadam. `decay_end_step` 0 means the end of
    the run.

    Raises:
        ValueError: For an unknown optimiser or schedule.
    """
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
            mask=matrices,
        )
    elif config.name == "lars":
        tx = optax.lars(
            schedule,
            weight_decay=config.weight_decay,
            weight_decay_mask=matrices,
            trust_ratio_mask=matrices,
            momentum=config.b1,
        )
    elif config.name == "muon":
        tx = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            weight_decay_mask=matrices,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=block_kernels,
        )
    else:
        raise ValueError(configs.suggest(config.name, OPTIMIZERS, "optimizer"))
    if config.clip_norm > 0:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return tx, schedule


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
