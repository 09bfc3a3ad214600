"""What samplers integrate: a velocity, whole or in two parts."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

# Called as velocity(x_t (b, h, w, c), t (b,), y (b,)); returns (b, h, w, c).
Velocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class TwoPart(Protocol):
    """A network of two parts such as DiT-DH: head(x_t, trunk(x_t, t, y))."""

    def trunk(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> Any: ...

    def head(self, x_t: jax.Array, s: Any) -> jax.Array: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A velocity in two parts, so that several steps can share the first.

    Attributes:
        trunk: Called as trunk(x_t, t, y); returns arrays of any structure.
        head: Called as head(x_t, t, s) with the result s of `trunk`; returns a
            velocity.
    """

    trunk: Callable[[jax.Array, jax.Array, jax.Array], Any]
    head: Callable[[jax.Array, jax.Array, Any], Any]

    def __call__(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        return self.head(x_t, t, self.trunk(x_t, t, y))


def split(network: TwoPart) -> Split:
    """Returns the velocity of a network of two parts."""
    return Split(network.trunk, lambda x_t, t, s: network.head(x_t, s))


def as_split(velocity: Velocity) -> Split:
    """Returns the velocity as a `Split`, whose trunk is empty if it was not one."""
    if isinstance(velocity, Split):
        return velocity
    return Split(lambda x_t, t, y: y, velocity)


def like(velocity: Velocity, parts: Split) -> Velocity:
    """Returns `parts`, as a plain function where `velocity` is no `Split`.

    A velocity whose trunk is empty must not pass for one that can be shared.
    """
    return parts if isinstance(velocity, Split) else parts.__call__
