"""Multi-head self-attention, by the fastest program that the device has for it."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import ad_checkpoint
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from rae_jax.layers import linear, norm, partition, positions, tpu_attention

Rotary = tuple[jax.Array, jax.Array]
RESULT = "attention"  # Name of results that `stack.Stack` may keep.
TPUS = ("TPU v5", "TPU v6", "TPU7")  # Older ones have less vector memory.


class Attention(nnx.Module):
    """Self-attention over all tokens, with a fused projection of q, k and v.

    Products are in `dtype`; logits and softmax are in float32.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        rotary_pairs: str = "adjacent",
        dtype: DTypeLike = "float32",
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        if rotary_pairs not in positions.PAIRS:
            raise ValueError(
                f"Unknown rotary_pairs {rotary_pairs!r}; choose from {positions.PAIRS}."
            )
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}."
            )
        self.num_heads, self.rotary_pairs = num_heads, rotary_pairs
        self.head_dim = hidden_size // num_heads
        self.qkv = linear.linear(
            hidden_size, 3 * hidden_size, dtype=dtype, init=init, rngs=rngs
        )
        self.q_norm = norm.RMSNorm(self.head_dim, rngs=rngs) if qk_norm else None
        self.k_norm = norm.RMSNorm(self.head_dim, rngs=rngs) if qk_norm else None
        self.proj = linear.linear(
            hidden_size, hidden_size, dtype=dtype, init=init, rngs=rngs
        )

    def __call__(self, x: jax.Array, rotary: Rotary | None = None) -> jax.Array:
        """Maps tokens (b, n, d) to (b, n, d) in `dtype`.

        Args:
            x: Tokens.
            rotary: Tables (cos, sin), each (n, head_dim), that rotate q and k.
        """
        b, n, d = x.shape
        if rotary is not None:
            rotary = tuple(jnp.asarray(table, jnp.float32) for table in rotary)
        program = choose(b, n, self.num_heads, self.head_dim, str(self.qkv.dtype))
        is_split = partition.splits_features(d, self.head_dim)
        if program == "tpu" and not is_split and self.q_norm is None:
            out = self._on_tpu(self.qkv.columns(x), rotary)
        else:
            q, k, v = self.qkv.columns(x, 3, unit=self.head_dim)
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
            if program == "tpu":
                out = self._on_tpu((q, k, v), rotary)
            else:
                out = self._attend(program, q, k, v, rotary)
        out = ad_checkpoint.checkpoint_name(out, RESULT)
        return self.proj.rows(out, unit=self.head_dim)

    def _normed(self, x, normalize):
        if normalize is None:
            return x
        heads = x.reshape(*x.shape[:2], -1, self.head_dim)
        return normalize(heads).astype(x.dtype).reshape(x.shape)

    def _attend(self, program, q, k, v, rotary):
        b, n, d = q.shape
        q, k, v = (a.reshape(b, n, -1, self.head_dim) for a in (q, k, v))
        if rotary is not None:
            q = positions.apply_rotary(q, *rotary, self.rotary_pairs)
            k = positions.apply_rotary(k, *rotary, self.rotary_pairs)
        if program == "cudnn":
            out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        else:
            out = attend(q, k, v)
        return out.reshape(b, n, d)

    def _on_tpu(self, arrays, rotary):
        """Runs the kernel, which the partitioner cannot split, device by device."""
        hd, rotates = self.head_dim, rotary is not None
        turn = jnp.asarray(tpu_attention.rotation(self.rotary_pairs, hd))
        tables = (*rotary, turn.astype(arrays[0].dtype)) if rotates else ()

        def run(*args):
            qkv = jnp.concatenate(args[: len(arrays)], axis=-1)
            sizes = tpu_attention.Sizes(qkv.shape[-1] // (3 * hd), hd, rotates)
            return tpu_attention.attend(qkv, args[len(arrays) :], sizes)

        sizes = partition.axis_sizes()
        if not sizes:
            return run(*arrays, *tables)
        is_split = len(arrays) > 1 and partition.splits_features(
            arrays[0].shape[-1], hd
        )
        spec = P(*partition.batch_spec(sizes), None, "tensor" if is_split else None)
        specs = (spec,) * len(arrays) + (P(),) * len(tables)
        shared = jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)
        return shared(*arrays, *tables)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns attention (b, n, k, head_dim) of queries, keys and values like it."""
    logits = _logits(q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkqn,bnkd->bqkd", weights, v)


@jax.custom_vjp
def _logits(q, k):
    return jnp.einsum("bqkd,bnkd->bkqn", q, k, preferred_element_type=jnp.float32)


def _logits_forward(q, k):
    return _logits(q, k), (q, k)


def _logits_backward(saved, gradient):
    # JAX's own would multiply the float32 gradient with bfloat16 queries and keys.
    q, k = saved
    gradient = gradient.astype(q.dtype)
    of_q = jnp.einsum("bkqn,bnkd->bqkd", gradient, k)
    return of_q, jnp.einsum("bkqn,bqkd->bnkd", gradient, q)


_logits.defvjp(_logits_forward, _logits_backward)


def choose(b: int, n: int, num_heads: int, head_dim: int, dtype: str) -> str:
    """Returns the program for attention here: "tpu" (a kernel), "cudnn" or "xla".

    What is chosen on an accelerator is logged once for each shape: a slow choice as a
    warning with its reason.
    """
    here = partition.device()
    platform, kind = here.platform, here.device_kind
    if platform in ("gpu", "cuda"):
        program, reason = "cudnn", _refusal_on_gpu(head_dim, dtype)
    elif platform == "tpu":
        program, reason = "tpu", _refusal_on_tpu(b, n, num_heads, head_dim, kind)
    else:
        return "xla"
    program = "xla" if reason else program
    _report(program, reason, kind, f"{n} tokens, {num_heads} heads of {head_dim}")
    return program


def _refusal_on_tpu(b, n, num_heads, head_dim, kind):
    sizes = partition.axis_sizes()
    rows = math.prod(sizes.get(name, 1) for name in partition.BATCH_AXES)
    if not kind.startswith(TPUS):
        return f"{kind} has too little vector memory"
    if not sizes and jax.device_count() > 1:
        return "no mesh is set (jax.set_mesh)"
    if b % rows:
        return f"{b} samples cannot be split over {rows} devices"
    if num_heads % sizes.get("tensor", 1):
        return f"{num_heads} heads cannot be split over mesh.tensor"
    return tpu_attention.refusal(n, tpu_attention.Sizes(num_heads, head_dim, True))


def _refusal_on_gpu(head_dim, dtype):
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN has no {dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"cuDNN needs heads of a multiple of 8 and at most 128, not {head_dim}"
    if jax.default_backend() != "gpu":
        return "compiled on a machine without a GPU"
    capability = float(getattr(jax.devices()[0], "compute_capability", "0"))
    return "" if capability >= 8 else "cuDNN needs compute capability 8.0"


@functools.cache
def _report(program: str, reason: str, kind: str, shape: str) -> None:
    logger = logging.getLogger(__name__)
    if reason:
        logger.warning(
            "Attention on %s without a kernel (%s): %s.", kind, shape, reason
        )
    else:
        logger.info("Attention on %s by %s (%s).", kind, program, shape)
