"""How a config says to sample: grid, method and guidance, checked before training."""

import ast
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.diffusion import grids, guidance, samplers, velocities
from rae_jax.evaluation import generate
from rae_jax.trainers import frozen, latent_network, weights

CLASSIFIER_FREE = "cfg"
AUTOGUIDANCE = "autoguidance"
INTERNAL = "internal"
GUIDANCE = (CLASSIFIER_FREE, AUTOGUIDANCE, INTERNAL)
# Also what the configs of older runs do not say.
DEFAULTS = dict(
    name="euler",
    num_points=50,
    final_zero=False,
    times=(),
    options="",
    guidance=CLASSIFIER_FREE,
    guide="",
    guidance_scale=1.0,
    guidance_interval=(0.0, 1.0),
)


def complete(block: Mapping[str, Any] | ConfigDict, **changes: Any) -> ConfigDict:
    """Returns a `sampling` block with defaults for what it lacks, and with changes.

    Raises:
        ConfigError: For a key that there is not, or a value of another type.
    """
    complete = ConfigDict(DEFAULTS)
    for key, value in {**block, **changes}.items():
        if key not in DEFAULTS:
            raise configs.ConfigError(configs.suggest(key, list(DEFAULTS), "key"))
        try:
            complete[key] = value
        except TypeError as error:
            raise configs.ConfigError(f"sampling.{key}: {error}") from error
    return complete.lock()


def parse_options(text: str) -> dict[str, Any]:
    """Turns "period=4" or "diffusion=sigma, strength=0.5" into a dict.

    Raises:
        ConfigError: The text is not of this form.
    """
    problem = configs.ConfigError(
        f"Sampler options {text!r}: give each one once, as in "
        "'diffusion=constant, strength=0.5' or 'steps=(0, 10, 20)'."
    )
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        is_dict = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        words = call.keywords if is_dict and not call.args else [ast.keyword()]
        options = {word.arg: _literal(word.value) for word in words if word.arg}
    except (SyntaxError, ValueError) as error:
        raise problem from error
    if len(options) < len(words):
        raise problem
    return options


def _literal(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a `sampling` block says, for one size of latents.

    Attributes:
        sampler: Method, grid and options.
        guidance: Name in `GUIDANCE`.
        interval: Times at which it acts.
        null_label: Label that means none; the number of classes.
    """

    sampler: samplers.Sampler
    guidance: str
    interval: guidance.Interval
    null_label: int

    @property
    def num_states(self) -> int:
        """Number of states on the way, with the noise and the sample."""
        return len(self.sampler.times)

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
        """Samples normalised latents.

        Args:
            networks: "dit" and, for autoguidance, "guide".
            scale: Guidance scale; 1 for none.
            shape: Shape (h, w, c) of a latent.
            seed: With its index, determines all that is random in a sample.
            index: Indices (b,) of the samples.
            labels: Their classes (b,).
            keep: Indices into the grid of the states to record.
        """
        guided = self._guided(networks, scale)
        eps = generate.sample_noise(seed, index, shape)
        keys = generate.sample_keys(seed, index)
        return self.sampler(guided, eps, labels, keys, keep)

    def _guided(
        self, networks: Mapping[str, nnx.Module], scale: float
    ) -> velocities.Velocity:
        if self.guidance == INTERNAL:
            both = self._both(networks["dit"])
            return guidance.internal_guidance(both, scale, self.interval)
        velocity = self._velocity(networks["dit"])
        if self.guidance == AUTOGUIDANCE:
            guide = self._velocity(networks["guide"])
            return guidance.autoguidance(velocity, guide, scale, self.interval)
        return guidance.classifier_free(velocity, scale, self.null_label, self.interval)

    def _both(self, network: nnx.Module) -> guidance.Velocities:
        """Returns the velocities of the last layer and of the early head."""
        if self.sampler.shares_trunk:
            return velocities.split_early(network)
        return lambda x_t, t, y: network.outputs(x_t, t, y)[:2]

    def _velocity(self, network: nnx.Module) -> velocities.Velocity:
        # A guide without a trunk is called in every step.
        if self.sampler.shares_trunk and has_trunk(type(network)):
            return velocities.split(network)
        return network

    def describe(self) -> dict[str, Any]:
        """Returns all of the plan that changes samples, as JSON can hold it."""
        times = self.sampler.times
        return {
            "name": self.sampler.name,
            "steps": len(times) - 1,
            "last_time": float(times[-1]),
            "times": f"{zlib.crc32(times.tobytes()):08x}",
            "options": dict(self.sampler.options),
            "guidance": self.guidance,
            "interval": list(self.interval),
        }


def make_plan(
    block: Mapping[str, Any] | ConfigDict,
    *,
    shift: float,
    network: type[nnx.Module],
    num_classes: int,
    early_depth: int = 0,
) -> Plan:
    """Returns what a `sampling` block says.

    Args:
        block: The block; see `DEFAULTS`.
        shift: Time shift of the latents.
        network: Class of the diffusion transformer.
        num_classes: Its number of classes.
        early_depth: Its blocks before an early head; 0 for none.

    Raises:
        ValueError: For anything that would fail while sampling.
    """
    block = complete(block)
    _check_guidance(block, early_depth)
    try:
        sampler = samplers.make_sampler(
            block.name,
            num_points=block.num_points,
            shift=shift,
            final_zero=block.final_zero,
            times=block.times,
            options=parse_options(block.options),
        )
    except TypeError as error:
        raise configs.ConfigError(
            f"Sampler {block.name!r} cannot use {block.options!r}: {error}"
        ) from error
    if sampler.shares_trunk and not has_trunk(network):
        raise configs.ConfigError(
            f"Sampler {block.name!r} shares the output of a trunk between steps, and "
            f"{network.__name__} has no trunk and head; choose another sampler."
        )
    interval = tuple(map(float, block.guidance_interval))
    return Plan(sampler, block.guidance, interval, num_classes)


def plan_of(config: ConfigDict) -> Plan:
    """Returns how a run samples."""
    return make_plan(
        config.sampling,
        shift=latent_network.time_shift(config),
        network=latent_network.network_class(config),
        num_classes=config.model.num_classes,
        early_depth=config.model.get("early_depth", 0),
    )


def _check_guidance(block: ConfigDict, early_depth: int) -> None:
    if block.guidance not in GUIDANCE:
        raise configs.ConfigError(
            configs.suggest(block.guidance, GUIDANCE, "sampling.guidance")
        )
    if block.guidance == INTERNAL and not early_depth:
        raise configs.ConfigError(
            "sampling.guidance = 'internal' reads an early head, which the network "
            "lacks; train one with model.early_depth = 8."
        )
    if block.guidance == AUTOGUIDANCE and not block.guide:
        raise configs.ConfigError(
            "sampling.guidance = 'autoguidance' needs sampling.guide: the workdir or "
            "the weights of a weaker model."
        )
    if block.guidance != AUTOGUIDANCE and block.guide:
        raise configs.ConfigError(
            f"sampling.guide goes with sampling.guidance = {AUTOGUIDANCE!r}, not "
            f"{block.guidance!r}."
        )
    interval = block.guidance_interval
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise configs.ConfigError(
            f"sampling.guidance_interval must be two times, low and high, not "
            f"{interval}."
        )


def has_trunk(network: type[nnx.Module]) -> bool:
    """Returns whether a network is of two parts, see `velocities.TwoPart`."""
    return hasattr(network, "trunk") and hasattr(network, "head")


def load_guide(config: ConfigDict, workdir: Path) -> nnx.Module | None:
    """Loads the weaker network that a run's `sampling.guide` names, if it does.

    Raises:
        FileNotFoundError: Nothing is there; the message says how to get it.
        ValueError: It is for other latents or classes.
    """
    source = complete(config.sampling).guide
    if not source:
        return None
    path = frozen.resolve(source, workdir)
    source = str(path) if path.exists() else source
    shape = frozen.latent_shape(config.encoder.sizes)
    guide = load_network(source, shape, dtype=config.model.dtype)
    check_classes(guide, source, config.model.num_classes)
    return guide


def load_network(source: str, shape: tuple[int, int, int], *, dtype: str) -> nnx.Module:
    """Loads a diffusion transformer for latents of a shape (h, w, c).

    Args:
        source: See `weights.open_source`.
        shape: The shape.
        dtype: Type of the products.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is another network, or for other latents.
    """
    opened = weights.open_source(source)
    if opened.kind not in latent_network.NETWORKS:
        raise ValueError(
            f"{source} holds weights of the kind {opened.kind}, not of a diffusion "
            "transformer."
        )
    size, channels = (opened.arguments[k] for k in ("input_size", "in_channels"))
    if (size, size, channels) != shape:
        raise ValueError(
            f"{source} is for latents {(size, size, channels)}; those of the "
            f"autoencoder are {shape}."
        )
    return weights.load(opened, dtype=dtype, remat="none")


def check_classes(guide: nnx.Module, source: str, num_classes: int) -> None:
    """Raises a ValueError if a guide has another number of classes."""
    if guide.num_classes != num_classes:
        raise ValueError(
            f"The network has {num_classes} classes and its guide {source} "
            f"{guide.num_classes}."
        )
