"""Two-dimensional position tables: sine-cosine and rotary.

Tokens are row-major, n = row * grid + column.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

PAIRS = ("adjacent", "halves")


@lru_cache(maxsize=16)
def sincos_2d(dim: int, grid: int) -> np.ndarray:
    """Returns the sine-cosine table (grid * grid, dim) of MAE, float32, read-only.

    The first half encodes the column, the second half the row; each half is
    [sin | cos] of the position times 10000^(-k / (dim / 4)).

    Raises:
        ValueError: If `dim` is not a multiple of four.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}.")
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    angles = np.arange(grid)[:, None] * omega[None, :]
    code = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return _by_token(code, code, columns_first=True)


@lru_cache(maxsize=16)
def rotary_2d(head_dim: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin of the rotary angles, (grid * grid, head_dim) float32 each.

    The first half of a head rotates with the row, the second with the column,
    in adjacent pairs, at frequencies 10000^(-2k / (head_dim / 2)).

    Raises:
        ValueError: If `head_dim` is not a multiple of four.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}.")
    half = head_dim // 2
    frequencies = 10000.0 ** (-np.arange(0, half, 2) / half)
    angles = np.arange(grid)[:, None] * np.repeat(frequencies, 2)[None, :]
    return tuple(_by_token(f(angles), f(angles)) for f in (np.cos, np.sin))


@lru_cache(maxsize=16)
def rotary_centers(
    head_dim: int,
    rows: int,
    columns: int,
    *,
    theta: float = 100.0,
    num_prefix: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin of DINOv3's rotary angles (arXiv:2508.10104).

    Patch centres have coordinates from -1 to 1 over the height and over the width
    of the image, whatever its size. The first half of the angles turns with the row,
    the second with the column, at 2 pi theta^(-4k / head_dim); both halves of a head
    turn by the same angles, see `apply_rotary` with pairs "halves".

    Args:
        head_dim: Features per head.
        rows: Patches per column of the image.
        columns: Patches per row of the image.
        theta: Base of the frequencies.
        num_prefix: Tokens before the patches, which are not rotated.

    Returns:
        Two tables (num_prefix + rows * columns, head_dim) float32, read-only.

    Raises:
        ValueError: If `head_dim` is not a multiple of four.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}.")
    frequencies = 2 * np.pi * theta ** (-4 * np.arange(head_dim // 4) / head_dim)
    angles = [
        (2 * (np.arange(size) + 0.5) / size - 1)[:, None] * frequencies[None, :]
        for size in (rows, columns)
    ]
    tables = []
    for function, at_rest in ((np.cos, 1.0), (np.sin, 0.0)):
        table = np.tile(_by_token(*map(function, angles)), 2)
        prefix = np.full((num_prefix, head_dim), at_rest, np.float32)
        tables.append(np.concatenate([prefix, table]))
        tables[-1].flags.writeable = False
    return tuple(tables)


def _by_token(
    rows: np.ndarray, columns: np.ndarray, columns_first: bool = False
) -> np.ndarray:
    """Joins codes per row and per column, (grid, d) each, into (grid * grid, 2 d)."""
    shape = (len(rows), len(columns), rows.shape[1])
    parts = [
        np.broadcast_to(rows[:, None, :], shape),
        np.broadcast_to(columns[None, :, :], shape),
    ]
    table = np.concatenate(parts[::-1] if columns_first else parts, axis=-1)
    table = table.reshape(shape[0] * shape[1], -1).astype(np.float32)
    table.flags.writeable = False  # The caches hand out the same array.
    return table


def apply_rotary(
    x: jax.Array, cos: jax.Array, sin: jax.Array, pairs: str = "adjacent"
) -> jax.Array:
    """Rotates feature pairs of queries or keys x (b, n, k, head_dim).

    The rotation is in float32; the result has the type of `x`. `cos` and `sin` are
    tables (n, head_dim): of `rotary_2d` for pairs of "adjacent" features, of
    `rotary_centers` for pairs of features that are half a head apart, "halves".
    """
    wide = x.astype(jnp.float32)
    if pairs == "halves":
        first, second = jnp.split(wide, 2, axis=-1)
        swapped = jnp.concatenate([-second, first], axis=-1)
    else:
        wide = wide.reshape(*x.shape[:-1], -1, 2)
        swapped = jnp.stack([-wide[..., 1], wide[..., 0]], axis=-1).reshape(x.shape)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
