"""Checksums of a state: what is read back must be what was written, bit by bit.

A checksum is the sum, modulo 2**32, of every entry's bits times an odd weight that
depends on the entry's place. Integer sums do not depend on their order, so the devices
compute it where the arrays lie, in one pass over memory, and it is the same on any
number of devices, however the arrays are split. No flipped bit goes unnoticed, and of
other damage one case in four thousand million.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.training import distributed

_MIX = 2_654_435_761  # Knuth's multiplicative hash, odd.
_CHUNK = 2**22  # Entries that the host handles at a time.


def of_arrays(tree: Any) -> dict[str, int]:
    """Returns the checksum of every array of a tree on the devices, by its path."""
    if jax.default_backend() == "cpu":
        # There products and sums are not fused: one array at a time takes less memory.
        # Each waits for the one before: simulated devices share a pool of threads, and
        # many programs with collectives in flight can take all of it and hang.
        jax.block_until_ready(tree)
        sums = [jax.block_until_ready(_all_sums([x])) for x in jax.tree.leaves(tree)]
        values = np.concatenate([distributed.to_host(x) for x in sums])
    else:
        values = distributed.to_host(_all_sums(tree))
    return dict(zip(names(tree), map(int, values), strict=True))


def names(tree: Any) -> list[str]:
    """Returns the paths of a tree's leaves, the same for dicts and dataclasses."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return ["/".join(_word(key) for key in path) for path in paths]


def of_host(array: np.ndarray) -> int:
    """Returns the checksum of one array in the memory of the host."""
    flat = np.ascontiguousarray(array).reshape(-1)
    total = 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        place = np.arange(start, start + part.size, dtype=np.uint32)
        words = part.view(f"u{min(part.dtype.itemsize, 4)}").reshape(part.size, -1)
        for word in words.T.astype(np.uint32):
            total += int(np.sum(word * _weight(place), dtype=np.uint32))
    return total % 2**32


def of_json(content: Any) -> int:
    """Returns the checksum of what JSON can hold."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def damaged(stored: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Returns the names whose checksums differ."""
    return [name for name in found if stored.get(name) != found[name]]


@jax.jit
def _all_sums(tree: Any) -> jax.Array:
    return jnp.stack([_sum(x) for x in jax.tree.leaves(tree)])


def _sum(x: jax.Array) -> jax.Array:
    place = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        counter = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place + counter * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = min(x.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)
    if words.ndim > x.ndim:  # Eight bytes are two words.
        words = jnp.sum(words, axis=-1, dtype=jnp.uint32)
    return jnp.sum(words * _weight(place), dtype=jnp.uint32)


def _weight(place: Any) -> Any:
    """Returns an odd number for every place."""
    mixed = place * np.uint32(_MIX)
    return (mixed ^ (mixed >> np.uint32(15))) | np.uint32(1)


def _word(key: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)
