"""LPIPS, the perceptual distance of Zhang et al. (arXiv:1801.03924), version 0.1."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# The input is first scaled to [-1, 1]; these are ImageNet's moments on that scale.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Convolutions of one width, after an optional max-pool (window, stride)."""

    width: int
    convs: int = 1
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: tuple[int, int] | None = None


BACKBONES = {
    "vgg": (
        Stage(64, convs=2),
        Stage(128, convs=2, pool=(2, 2)),
        Stage(256, convs=3, pool=(2, 2)),
        Stage(512, convs=3, pool=(2, 2)),
        Stage(512, convs=3, pool=(2, 2)),
    ),
    "alex": (
        Stage(64, kernel=11, stride=4, padding=2),
        Stage(192, kernel=5, padding=2, pool=(3, 2)),
        Stage(384, pool=(3, 2)),
        Stage(256),
        Stage(256),
    ),
}


class LPIPS(nnx.Module):
    """Perceptual distance between images: weighted differences of CNN features.

    Everything is float32, but accelerators multiply in less by default: distances to
    report need `jax.default_matmul_precision("highest")`. Pass the parameters to jit
    as an argument; the compiler would fold the convolutions of constants.
    """

    def __init__(
        self,
        backbone: str = "vgg",
        *,
        widths: Sequence[int] | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds the trunk and one head per tap.

        Args:
            backbone: "vgg" (VGG-16) or "alex" (AlexNet).
            widths: Channels of the five stages; by default those of the real network.
            rngs: Random initial weights; real ones come from a conversion.
        """
        if backbone not in BACKBONES:
            raise ValueError(
                f"Unknown backbone {backbone!r}; choose from {list(BACKBONES)}."
            )
        stages = BACKBONES[backbone]
        if widths is not None:
            pairs = zip(stages, widths, strict=True)
            stages = tuple(dataclasses.replace(s, width=w) for s, w in pairs)
        self.stages = nnx.static(stages)
        channels = 3
        for i, stage in enumerate(stages, start=1):
            for j in range(1, stage.convs + 1):
                conv = _make_conv(channels, stage, rngs)
                setattr(self, f"conv{i}_{j}", conv)
                channels = stage.width
            setattr(self, f"head{i}", nnx.Param(jnp.ones((channels,), jnp.float32)))

    def features(self, images: jax.Array) -> list[jax.Array]:
        """Returns the five feature maps (b, h_i, w_i, c_i) of images in [0, 1]."""
        x = (2.0 * images - 1.0 - _channel(_SHIFT)) / _channel(_SCALE)
        taps = []
        for i, stage in enumerate(self.stages, start=1):
            if stage.pool is not None:
                window, stride = stage.pool
                x = nnx.max_pool(x, (window, window), (stride, stride))
            for j in range(1, stage.convs + 1):
                x = nnx.relu(getattr(self, f"conv{i}_{j}")(x))
            taps.append(x)
        if 0 in x.shape:
            raise ValueError(f"Images of shape {images.shape} are too small for LPIPS.")
        return taps

    def contributions(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Returns the share of each tap in the distances, (b, 5)."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3:
            raise ValueError(
                f"LPIPS compares two batches (b, h, w, 3), not {a.shape} and {b.shape}."
            )
        # Two passes, not one of both batches: a batch that needs no gradient then
        # costs no backward pass.
        pairs = zip(self.features(a), self.features(b), strict=True)
        shares = []
        for i, (tap_a, tap_b) in enumerate(pairs, start=1):
            difference = (_unit(tap_a) - _unit(tap_b)) ** 2  # (b, h, w, c)
            head = getattr(self, f"head{i}")[...]
            shares.append(jnp.mean(difference, axis=(1, 2)) @ head)
        return jnp.stack(shares, axis=-1)

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Returns the distances (b,) of images a and b (b, h, w, 3) in [0, 1]."""
        return jnp.sum(self.contributions(a, b), axis=-1)


def _make_conv(channels: int, stage: Stage, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        channels,
        stage.width,
        (stage.kernel, stage.kernel),
        strides=stage.stride,
        padding=stage.padding,
        rngs=rngs,
    )


def _channel(values: np.ndarray) -> np.ndarray:
    return values[None, None, None, :]


def _unit(features: jax.Array) -> jax.Array:
    """Features divided by their length over channels; zero stays zero.

    A root at zero has no derivative, so lengths of zero are replaced before it.
    """
    squares = jnp.sum(features**2, axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return features / (length + 1e-10)
