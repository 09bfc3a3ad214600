"""Rates of one device of a target, and how long a collective takes over its links."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from rae_jax.planning import targets

Place = tuple[int, tuple[int, ...]]
# How much more than its payload a ring sends: there and back.
ROUNDS = {"all-reduce": 2.0}


@dataclasses.dataclass(frozen=True)
class Links:
    """A target's devices in the order of a mesh.

    Attributes:
        target: The target.
        places: Slice (or node) and coordinates of every device, in mesh order.
    """

    target: targets.Target
    places: Sequence[Place]

    @property
    def platform(self) -> str:
        """Compiler, "tpu" or "cuda"."""
        return self.target.chip.platform

    @property
    def peak_flops(self) -> float:
        """Peak FLOP/s of one device."""
        return self.target.chip.peak_flops / self.target.chip.devices

    @property
    def hbm_bandwidth(self) -> float:
        """Bytes/s of one device."""
        return self.target.chip.hbm_bandwidth / self.target.chip.devices

    @property
    def clock(self) -> float:
        """Cycles/s."""
        return self.target.chip.clock

    def seconds(self, kind: str, payload: float, attributes: str) -> float:
        """Returns the time of a collective.

        Args:
            kind: Such as "all-gather".
            payload: Bytes, see `costs.Costs`.
            attributes: The instruction's, which name its groups of devices.
        """
        members = self.members(attributes)
        if len(members) < 2:
            return 0.0
        share = (len(members) - 1) / len(members)
        if kind == "collective-permute":
            share = 1.0
        return ROUNDS.get(kind, 1.0) * share * payload / self.bandwidth(members)

    def members(self, attributes: str) -> list[int]:
        """Returns the positions of the devices of the first group."""
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
        if pairs:
            ends = [p.split(",") for p in re.findall(r"\{(\d+,\d+)", pairs[0])]
            apart = [(int(a), int(b)) for a, b in ends if a != b]
            return list(apart[0]) if apart else []
        return group(attributes, len(self.places))

    def bandwidth(self, members: Sequence[int]) -> float:
        """Returns the bytes/s with which each of a group's devices can be reached.

        In a torus only the links along the axes that the group spans count: both of a
        closed ring, one of a line, whose ends have no other. Between slices or nodes
        each chip has its share of the network card, and a group uses that of all of
        its chips there.
        """
        chip = self.target.chip
        places = [self.places[m] for m in members if m < len(self.places)]
        near = [place for place in places if place[0] == places[0][0]]
        inside = chip.link_bandwidth
        if chip.platform == "tpu":
            one_way = chip.link_bandwidth / (2 * chip.axes)
            spans = np.ptp([place[1] for place in near], axis=0)
            sizes = self.target.shape
            links = sum(
                2 if size >= chip.ring and size % 4 == 0 else 1
                for span, size in zip(spans, sizes, strict=False)
                if span
            )
            inside = one_way * max(links, 1)
        if len(near) == len(places):
            return inside
        return min(inside, chip.network_bandwidth * len(near))


def group(attributes: str, devices: int) -> list[int]:
    """Reads the first of a collective's replica groups, in any of HLO's notations."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return [int(n) for n in listed[1].split(",") if n]
    pattern = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    iota = re.search(pattern, attributes)
    if iota:
        shape, dims, order = (
            [int(n) for n in (part or "").split(",") if n] for part in iota.groups()
        )
        ids = np.arange(np.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)[0].tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        return _mesh_group(mesh[1], mesh[2])
    return list(range(devices))


def _mesh_group(mesh: str, axes: str) -> list[int]:
    """Returns the group along axes, such as `'a'` or the part `'a':(2)4` of one."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
    names = list(sizes)
    steps = {
        name: int(np.prod([sizes[n] for n in names[k + 1 :]], dtype=int))
        for k, name in enumerate(names)
    }
    members = np.zeros(1, int)
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(size) if size else sizes[name]
        step = steps[name]
        if size:  # The part of this size that has `before` entries ahead of it.
            step *= sizes[name] // (int(before) * count)
        members = (members[:, None] + step * np.arange(count)).reshape(-1)
    return members.tolist()
