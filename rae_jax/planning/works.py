"""What a config computes, laid out on a mesh: a training step, sampling, decoding."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.evaluation import reconstruction
from rae_jax.models import decoder, rae
from rae_jax.trainers import frozen, latent_network, rae_decoder, registry, sampling
from rae_jax.training import flops, loop, sharding

WHATS = ("train", "sample", "decode")
SAMPLES = 50_000  # Of an evaluation: what "sample" and "decode" count hours for.


@dataclasses.dataclass(frozen=True)
class Work:
    """A function to compile, with shapes and places of its arguments.

    Attributes:
        function: The function.
        args: Abstract arguments with shardings.
        results: Shardings of its results, or None for the compiler's choice.
        donate: Whether the first argument is given away.
        batch_size: Images of one execution.
        executions: How often a run executes it.
        model_flops: FLOPs of one execution over all devices, without recomputation.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    results: Any
    donate: bool
    batch_size: int
    executions: int
    model_flops: float

    @property
    def held_bytes(self) -> float:
        """Bytes of the first argument on one device: the state, or the weights."""
        return device_bytes(self.args[0])


def make(config: ConfigDict, what: str, mesh: Mesh) -> Work:
    """Returns the work of a config; enter the mesh to trace its function.

    Raises:
        ValueError: The config cannot do that.
    """
    if what not in WHATS:
        raise ValueError(configs.suggest(what, WHATS, "--what"))
    makers = {"train": _train, "sample": _sample, "decode": _decode}
    return makers[what](config, mesh)


def device_bytes(tree: Any) -> float:
    """Returns what the arrays of a tree take up on one device."""
    total = 0.0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape)
        size = jnp.dtype(x.dtype).itemsize if not _is_key(x) else 8
        total += size * jnp.prod(jnp.asarray(shape, jnp.float32)).item()
    return total


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _train(config: ConfigDict, mesh: Mesh) -> Work:
    accumulate = config.optimizer.accumulate if "optimizer" in config else 1
    sharding.check_batch_size(config.data.batch_size, mesh, accumulate)
    design = registry.design(config)
    run_state = loop.abstract_state(design, config, mesh)
    placed = jax.tree.map(lambda x: x.sharding, run_state)
    return Work(
        function=design.step,
        args=(
            run_state,
            _placed(design.frozen, sharding.state_sharding(design.frozen, mesh)),
            _placed(design.batch, sharding.batch_sharding(mesh)),
            _placed(_key(), sharding.replicated(mesh)),
        ),
        results=(placed, None),
        donate=True,
        batch_size=design.batch_size,
        executions=design.num_steps,
        model_flops=registry.model_flops(config),
    )


def _sample(config: ConfigDict, mesh: Mesh) -> Work:
    """Draws one batch of latents as `sampling` says, all steps of it.

    A guide is taken to be as large as the network: its weights are not looked for.
    """
    if config.trainer != "latent_diffusion":
        raise configs.ConfigError(
            f"--what sample needs a latent_diffusion config, not {config.trainer!r}."
        )
    plan, block = sampling.plan_of(config), sampling.complete(config.sampling)
    graph, params = frozen.abstract(latent_network.make_model(_plain(config)))
    shape = frozen.latent_shape(config.encoder.sizes)
    names = ("dit", "guide") if block.guide else ("dit",)

    def run(params, index, labels):
        networks = {name: nnx.merge(graph, params[name]) for name in names}
        scale = block.guidance_scale
        return plan.draw(networks, scale, shape, 0, index, labels).x

    rows, size = sharding.batch_sharding(mesh), config.data.batch_size
    numbers = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows)
    weights = _placed({n: params for n in names}, sharding.replicated(mesh))
    return _inference(run, (weights, numbers, numbers), rows, size)


def _decode(config: ConfigDict, mesh: Mesh) -> Work:
    """Decodes one batch of latents to bytes.

    The decoder is that of a rae_decoder config. A latent_diffusion config names one by
    its workdir, which need not be here: the paper's ViT-XL stands for it.
    """
    config = _plain(config)
    if config.trainer == "latent_diffusion":
        with config.unlocked():
            config.model = decoder.PRESETS["xl"] | dict(dtype=config.model.dtype)
    elif config.trainer != "rae_decoder":
        raise configs.ConfigError(
            "--what decode needs a rae_decoder or latent_diffusion config, not "
            f"{config.trainer!r}."
        )
    encoder_def, encoder = frozen.encoder(config.encoder)
    graph, params = frozen.abstract(rae_decoder.make_model(config))

    def run(params, z, encoder):  # Of the encoder, no weights: only how it normalises.
        network = nnx.merge(graph, params)
        images = rae.decode(network, z, nnx.merge(encoder_def, encoder))
        return reconstruction.to_uint8(images)

    rows, size = sharding.batch_sharding(mesh), config.data.batch_size
    shape = (size, *frozen.latent_shape(config.encoder.sizes))
    z = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    whole = sharding.replicated(mesh)
    return _inference(
        run, (_placed(params, whole), z, _placed(encoder, whole)), rows, size
    )


def _inference(run: Callable[..., Any], args: Any, results: Any, size: int) -> Work:
    return Work(
        function=run,
        args=args,
        results=results,
        donate=False,
        batch_size=size,
        executions=-(-SAMPLES // size),
        model_flops=flops.count_flops(run, *args),
    )


def _plain(config: ConfigDict) -> ConfigDict:
    """Returns a copy whose network is built without rematerialisation."""
    config = config.copy_and_resolve_references()
    if "remat" in config.model:
        config.model.remat = "none"
    return config


def _placed(tree: Any, where: Any) -> Any:
    """Returns shapes with a sharding for all, or one for each of them."""
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
