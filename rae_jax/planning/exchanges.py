"""Collectives of a compiled program, also where the compiler has hidden them.

GPU programs, and TPU programs here and there, hold a collective as an instruction or
as a pair of a start and an end. The TPU compiler also wraps one in fusions: a
reduce-scatter in one of its own, and an all-gather that runs beside other work in
three or more, of which `async-collective-start` is the first, fusions with that other
work follow, and `async-collective-done` is the last; all hold the same channel.
"""

import dataclasses

from rae_jax.planning import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
START, DONE = "async-collective-start", "async-collective-done"
WHOLE, BEGINS, GOES_ON, ENDS = "whole", "begins", "goes on", "ends"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective, or a part of one.

    Attributes:
        kind: Of `KINDS`.
        phase: WHOLE, or which part it is.
        channel: Common to all parts.
        payload: Bytes on one device: the gathered result of an all-gather, what goes
            into any other.
        attributes: Those that name its groups of devices.
    """

    kind: str
    phase: str
    channel: str
    payload: float
    attributes: str


def find(program: hlo.Program, name: str, i: hlo.Instruction) -> Exchange | None:
    """Returns the collective that an instruction of a computation is or holds."""
    if i.opcode == "fusion":
        return _fused(program, i)
    for kind in KINDS:
        if i.opcode == kind:
            return _exchange(program, name, i, kind, WHOLE, i.name)
        if i.opcode == f"{kind}-start":
            return _exchange(program, name, i, kind, BEGINS, i.name)
        if i.opcode == f"{kind}-done":
            return Exchange(kind, ENDS, "".join(i.operands[:1]), 0.0, "")
    return None


def _fused(program: hlo.Program, i: hlo.Instruction) -> Exchange | None:
    inner = i.called.get("calls", "")
    for each in _inside(program, inner):
        computation, instruction = each
        kind, phase = instruction.opcode, WHOLE
        if "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        elif i.name.startswith(START):
            phase = BEGINS
        elif i.name.startswith(DONE):
            phase = ENDS
        elif "async_collective_fusion" in inner:
            phase = GOES_ON
        channel = instruction.field(r"channel_id=(\d+)") or i.name
        return _exchange(program, computation, instruction, kind, phase, channel)
    return None


def _inside(program: hlo.Program, name: str):
    """Yields the collectives in a fusion, with the computations they are in."""
    for i in program.computations.get(name, []):
        if i.opcode in KINDS:
            yield name, i
        elif i.opcode == "fusion":
            yield from _inside(program, i.called.get("calls", ""))


def _exchange(
    program: hlo.Program,
    name: str,
    i: hlo.Instruction,
    kind: str,
    phase: str,
    channel: str,
) -> Exchange:
    operands = [a for x in program.operands(name, i) for a in x.arrays]
    result = i.arrays
    if i.opcode == "all-gather-start":  # Returns its operands, too.
        result = result[len(operands) :] or result
    arrays = result if kind == "all-gather" else operands
    payload = sum(a.bytes for a in arrays)
    return Exchange(kind, phase, channel, payload, i.rest)
