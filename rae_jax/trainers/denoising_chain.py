"""Images from the rows of l-DAE that are diffusion models, by ancestral sampling.

A row is one if its noise ends in pure noise and its network reads and predicts
latents; see `refusal` for the others.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.diffusion import ancestral, grids, schedules
from rae_jax.evaluation import generate
from rae_jax.losses import denoising
from rae_jax.trainers import chains, inputs, ldae, sampling, tokenizing
from rae_jax.training import checkpoints, sharding, state

NAME = "ancestral"
# Also what the configs of older runs do not say.
DEFAULTS = dict(num_steps=250, variance="auto", guidance_scale=1.0)
UNLABELLED = ("image",)  # What samples without classes are of.


def refusal(config: ConfigDict) -> str:
    """Returns why a run defines no generative process, or "" if it does."""
    noise = config.noise
    if noise.schedule not in schedules.PRESERVING:
        return (
            f"noise.schedule = {noise.schedule!r} never gets rid of the image: its "
            "noisiest level is no known distribution to start from, so this run "
            "denoises and does not generate. Runs with "
            f"{' or '.join(map(repr, schedules.PRESERVING))} do."
        )
    if noise.input_space != "latent" or noise.target not in denoising.LATENT_TARGETS:
        return (
            f"noise.input_space = {noise.input_space!r} and noise.target = "
            f"{noise.target!r}: samples are drawn where the network reads and predicts "
            "latents, that is with 'latent' and one of "
            f"{denoising.LATENT_TARGETS}."
        )
    return ""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How a run samples; what `sampling.Plan` is to stage 2.

    Attributes:
        levels: Levels that are visited.
        prediction: "eps" or "x".
        variance: Of `ancestral.sample_ancestral`.
        num_classes: Of the network; 0 if it knows none.
    """

    levels: ancestral.Levels
    prediction: str
    variance: str
    num_classes: int

    @property
    def null_label(self) -> int:
        """Number of labels that a sample may have: one that is not looked at, or all
        classes, whose number itself means none."""
        return self.num_classes or len(UNLABELLED)

    @property
    def num_states(self) -> int:
        """Number of states on the way, with the noise and the sample."""
        return len(self.levels.t) + 1

    def draw(
        self,
        networks: Mapping[str, nnx.Module],
        scale: float,
        shape: tuple[int, int, int],
        seed: int,
        index: jax.Array,
        labels: jax.Array,
        keep: Sequence[int] = (),
    ) -> grids.Sampled:
        """Samples latents (b, h, w, d); see `sampling.Plan.draw`."""
        z = generate.sample_noise(seed, index, shape)
        keys = generate.sample_keys(seed, index)
        return ancestral.sample_ancestral(
            self._denoise(networks["dit"], labels, scale),
            z,
            keys,
            self.levels,
            prediction=self.prediction,
            variance=self.variance,
            keep=keep,
        )

    def _denoise(
        self, network: nnx.Module, labels: jax.Array, scale: float
    ) -> ancestral.Denoise:
        def call(z, t, y):
            tokens = network(z.reshape(len(z), -1, z.shape[-1]), t, y)
            out = tokens.reshape(*z.shape[:3], -1)
            return jnp.split(out, 2, axis=-1) if network.learn_sigma else (out, None)

        def denoise(z, t):
            return call(z, t, labels if self.num_classes else None)

        def guided(z, t):
            # A sample and its null copy are neighbours, as in `guidance`.
            nulls = jnp.full_like(labels, self.num_classes)
            y = jnp.stack([labels, nulls], axis=1).reshape(-1)
            out, v = call(jnp.repeat(z, 2, axis=0), jnp.repeat(t, 2), y)
            out, null = out[::2], out[1::2]
            return null + scale * (out - null), None if v is None else v[::2]

        if scale == 1:
            return denoise
        if not self.num_classes:
            raise configs.ConfigError(
                f"The guidance scale {scale:g} is for a network that knows classes, "
                "which this one does not (model.num_classes = 0): leave it at 1."
            )
        return guided

    def describe(self) -> dict[str, Any]:
        """Returns all of the plan that changes samples, as JSON can hold it."""
        return {
            "name": NAME,
            "steps": len(self.levels.t),
            "variance": self.variance,
            "prediction": self.prediction,
        }


def make_plan(config: ConfigDict) -> Plan:
    """Returns how a run samples.

    Raises:
        ConfigError: It does not, or its `sampling` block cannot be.
    """
    why = refusal(config)
    if why:
        raise configs.ConfigError(why)
    block, learned = config.sampling, config.model.get("learn_sigma", False)
    allowed = ("auto", *ancestral.VARIANCES)
    if block.variance not in allowed:
        raise configs.ConfigError(
            configs.suggest(block.variance, allowed, "sampling.variance")
        )
    if block.variance == "learned" and not learned:
        raise configs.ConfigError(
            "sampling.variance = 'learned', but the network has learned none "
            "(model.learn_sigma): choose 'small' or 'large'."
        )
    variance = block.variance
    if variance == "auto":  # As the official code of DiT.
        variance = "learned" if learned else "large"
    noise = config.noise
    try:
        levels = ancestral.make_levels(
            noise.schedule, block.num_steps, noise.num_levels
        )
    except ValueError as error:
        raise configs.ConfigError(f"sampling.num_steps: {error}") from error
    prediction = "eps" if noise.target == "eps" else "x"
    return Plan(levels, prediction, variance, ldae.num_classes(config))


def complete(block: Mapping[str, Any], **changes: Any) -> ConfigDict:
    """Returns a `sampling` block with defaults for what it lacks, and with changes.

    Args:
        block: The block of a run.
        **changes: Values that `rae-jax sample` gives, by their names in stage 2:
            `num_points` is the number of steps, `options` may be "variance=small".

    Raises:
        ConfigError: For a change that this sampler does not know.
    """
    unset = {"times": (), "guide": ""}
    changes = {k: v for k, v in changes.items() if k not in unset or v != unset[k]}
    if changes.pop("name", NAME) != NAME:
        raise configs.ConfigError(f"Runs of l-DAE have one sampler, {NAME!r}.")
    if "num_points" in changes:
        changes["num_steps"] = changes.pop("num_points")
    changes |= sampling.parse_options(changes.pop("options", ""))
    if changes.pop("guidance", sampling.CLASSIFIER_FREE) != sampling.CLASSIFIER_FREE:
        raise configs.ConfigError(
            "Runs of l-DAE are guided against no class alone, "
            f"{sampling.CLASSIFIER_FREE!r}."
        )
    found = ConfigDict(DEFAULTS)
    for key, value in {**block, **changes}.items():
        if key not in DEFAULTS:
            raise configs.ConfigError(configs.suggest(key, list(DEFAULTS), "key"))
        try:
            found[key] = value
        except TypeError as error:
            raise configs.ConfigError(f"sampling.{key}: {error}") from error
    return found.lock()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Generator(chains.Chain):
    """The chain of an l-DAE run: its EMA network and its tokenizer.

    Attributes:
        config: Config of the run, its `sampling` block complete.
    """

    config: ConfigDict

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that samples can have."""
        if not self.plan.num_classes:
            return UNLABELLED
        return inputs.class_names(self.config.data, self.plan.num_classes)

    def untrained(self) -> "Generator":
        """Returns the same chain with a freshly initialised network."""
        make = ldae.make_model(self.config)
        params = jax.jit(
            lambda: state.param_dict(make(rngs=nnx.Rngs(self.config.seed)))
        )()
        placed = sharding.place(params, self.mesh)
        return dataclasses.replace(self, params=self.params | {"dit": placed})


def load(workdir: Path, config: ConfigDict, **changes: Any) -> Generator:
    """Loads the EMA network and the tokenizer of a run.

    Args:
        workdir: Its folder.
        config: Its config.
        **changes: See `complete`.

    Raises:
        ConfigError: The run defines no generative process, or the tokenizer is
            missing.
        CheckpointError: The run has no checkpoint.
    """
    config = config.copy_and_resolve_references()
    block = complete(config.get("sampling") or {}, **changes)
    with config.unlocked():
        config.sampling = block
    plan = make_plan(config)  # An error before anything is loaded.
    mesh = sharding.make_mesh(-1)
    grid = config.data.image_size // config.tokenizer.patch_size
    shape = (grid, grid, config.tokenizer.latent_dim)
    params = {
        "dit": checkpoints.load_params(workdir),
        "tokenizer": tokenizing.load(workdir, config),
    }

    def decode(params, z):
        tokens = z.reshape(len(z), -1, z.shape[-1])
        return (params["tokenizer"].decode(tokens) + 1) / 2

    return Generator(
        plan=plan,
        graphs={"dit": state.abstract_model(ldae.make_model(config))},
        decode=decode,
        params=sharding.place(params, mesh),
        stats={"mean": np.zeros(shape, np.float32), "var": np.ones(shape, np.float32)},
        mesh=mesh,
        config=config,
    )
