"""A compiled step -> time, FLOPs, memory traffic and collectives, loops multiplied out.

TPU programs carry the compiler's estimate of the cycles of every instruction but not of
collectives, whose time is their payload over the links that they can use, as far as
no other work runs meanwhile. A custom kernel carries no estimate either; it counts as
its FLOPs at half the peak rate, or its memory traffic if that takes longer. GPU
programs carry no estimate at all: there each instruction counts as the longer of its
FLOPs at the peak rate and its memory traffic at the full bandwidth, a roofline that no
kernel quite reaches.
"""

import dataclasses
from collections import Counter

from rae_jax.planning import counting, exchanges, hlo, links

KERNELS = ("tpu_custom_call", "mosaic", "triton", "__gpu$xla.gpu.triton")
KERNEL_SHARE = 0.5  # Of the peak rate that a custom kernel is taken to reach.


@dataclasses.dataclass
class Costs:
    """What one execution of a program costs one device.

    Attributes:
        seconds: Time of everything but collectives.
        exposed: Time of collectives during which nothing else runs.
        network: Time of all collectives.
        flops: Of matrix products and convolutions, recomputation included.
        kernel_flops: Those of custom kernels among them.
        hbm_bytes: Read and written.
        collective_bytes: Payload by kind: the gathered result of an all-gather, what a
            device puts into any other.
        lines: Seconds by source line.
        unknown: Names of custom kernels whose FLOPs are not known.
    """

    seconds: float = 0.0
    exposed: float = 0.0
    network: float = 0.0
    flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    collective_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    lines: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: "Costs", times: float = 1.0) -> None:
        """Adds another cost, `times` over."""
        for name in ("seconds", "exposed", "network", "flops", "kernel_flops"):
            value = getattr(self, name) + times * getattr(other, name)
            setattr(self, name, value)
        self.hbm_bytes += times * other.hbm_bytes
        for name in ("collective_bytes", "lines"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += times * value
        self.unknown |= other.unknown


def count(text: str, wires: links.Links) -> Costs:
    """Counts the cost of a compiled program on one device.

    Args:
        text: The compiled text.
        wires: Rates of the device, and how its neighbours are reached.

    Raises:
        ValueError: The text is not that of a compiled program.
    """
    program = hlo.parse(text)
    return _Count(program, wires).computation(program.entry)


class _Count:
    """Costs of the computations of one program."""

    def __init__(self, program: hlo.Program, wires: links.Links):
        self.program, self.wires = program, wires
        self.known: dict[str, Costs] = {}

    def computation(self, name: str) -> Costs:
        """Returns the cost of one execution of a computation."""
        if name not in self.known:
            self.known[name] = total = Costs()
            running: dict[str, tuple[float, float]] = {}
            for i in self.program.computations.get(name, []):
                found = exchanges.find(self.program, name, i)
                if found is not None:
                    self._exchange(total, found, running)
                if found is None or found.phase == exchanges.GOES_ON:
                    self._instruction(total, name, i)
            for seconds, since in running.values():  # They end in the next round.
                total.exposed += max(0.0, seconds - (total.seconds - since))
        return self.known[name]

    def _instruction(self, total: Costs, name: str, i: hlo.Instruction) -> None:
        called = i.called
        if i.opcode == "while":
            trips = self.program.trips(i)
            for role in ("body", "condition"):
                total.add(self.computation(called.get(role, "")), trips)
        elif i.opcode == "conditional":
            branches = [self.computation(branch) for branch in i.branches]
            if branches:
                total.add(max(branches, key=lambda cost: cost.seconds))
        elif i.opcode in ("call", "async-start"):
            inner = called.get("to_apply") or called.get("calls", "")
            total.add(self.computation(inner))
        else:
            total.add(self._leaf(name, i))

    def _leaf(self, name: str, i: hlo.Instruction) -> Costs:
        wires = self.wires
        flops = counting.flops(self.program, name, i)
        moved = counting.hbm_bytes(self.program, name, i)
        if i.opcode == "custom-call" and "AllocateBuffer" in i.rest:
            moved = 0.0
        roofline = max(flops / wires.peak_flops, moved / wires.hbm_bandwidth)
        seconds = i.cycles / wires.clock if wires.platform == "tpu" else roofline
        cost = Costs(seconds, flops=flops, hbm_bytes=moved)
        if _is_kernel(i) and not i.cycles:
            stated = float(i.field(r'"flops":"?(\d+)') or 0)
            cost.flops = cost.kernel_flops = max(flops, stated)
            rate = KERNEL_SHARE * wires.peak_flops
            cost.seconds = max(cost.flops / rate, moved / wires.hbm_bandwidth)
            if not cost.flops:
                cost.unknown.add(self.program.source(i))
        if cost.seconds:
            cost.lines[self.program.source(i)] = cost.seconds
        return cost

    def _exchange(
        self,
        total: Costs,
        found: exchanges.Exchange,
        running: dict[str, tuple[float, float]],
    ) -> None:
        """Counts a collective; one in parts hides behind what runs between them.

        `running` has the time of those under way, and the time when each began.
        """
        if found.phase == exchanges.ENDS:
            seconds, since = running.pop(found.channel, (0.0, total.seconds))
            total.exposed += max(0.0, seconds - (total.seconds - since))
            return
        if found.phase == exchanges.GOES_ON:
            return
        seconds = self.wires.seconds(found.kind, found.payload, found.attributes)
        total.collective_bytes[found.kind] += found.payload
        total.network += seconds
        if found.phase == exchanges.BEGINS:
            running[found.channel] = (seconds, total.seconds)
        else:
            total.exposed += seconds


def _is_kernel(i: hlo.Instruction) -> bool:
    target = i.field(r'custom_call_target="([^"]*)"') or ""
    return i.opcode == "custom-call" and target.startswith(KERNELS)


def top_lines(cost: Costs, number: int = 5) -> list[tuple[str, float]]:
    """Returns the source lines that take longest, and their share of the time."""
    whole = cost.seconds or 1.0
    return [(line, s / whole) for line, s in cost.lines.most_common(number)]
