"""What samplers integrate: a velocity, whole or in two parts."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

# Called as velocity(x_t (b, h, w, c), t (b,), y (b,)); returns (b, h, w, c).
Velocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Outputs(NamedTuple):
    """What a network returns in training.

    Attributes:
        velocity: Velocity (b, h, w, c).
        early: That of an early head, if the network has one.
        aligned: Tokens (b, n, d) to compare with an encoder's, likewise.
    """

    velocity: jax.Array
    early: jax.Array | None = None
    aligned: jax.Array | None = None


class TwoPart(Protocol):
    """A network of two parts such as DiT-DH: head(x_t, trunk(x_t, t, y), t)."""

    def trunk(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> Any: ...

    def head(self, x_t: jax.Array, s: Any, t: jax.Array) -> jax.Array: ...


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
    return Split(network.trunk, lambda x_t, t, s: network.head(x_t, s, t))


def split_early(network: Any) -> Split:
    """Returns the velocities of a network of two parts and of its early head.

    What the early head predicts belongs to the trunk, so steps that share the trunk's
    output share it, too; it becomes a velocity where it is used.
    """

    def head(x_t, t, s):
        conditions, early = s
        velocity = network.velocity(early, x_t, t)
        return network.head(x_t, conditions, t), velocity

    return Split(network.trunk_and_early, head)


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
