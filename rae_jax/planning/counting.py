"""FLOPs and memory traffic of single instructions of a compiled program."""

import math
import re

import numpy as np

from rae_jax.planning import hlo

# Their operands are named, not read.
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "copy-done",
    "slice-done",
    "async-done",
    "async-update",
}
_SLICES = {"dynamic-slice", "slice", "gather"}
_VIEWS = {"bitcast", "convert", "copy", "reshape"}


def flops(program: hlo.Program, computation: str, i: hlo.Instruction) -> float:
    """Counts the FLOPs of the matrix products and convolutions of an instruction.

    Those of a fusion are counted inside of it; loops and calls count 0 here.
    """
    if i.opcode == "fusion":
        inner = i.called.get("calls", "")
        body = program.computations.get(inner, [])
        return sum(flops(program, inner, each) for each in body)
    operands = [x.arrays[0] for x in program.operands(computation, i) if x.arrays]
    if len(operands) < 2:
        return 0.0
    if i.opcode == "convolution":
        return _convolution(i, operands)
    if i.opcode == "dot":
        return _dot(i, operands, r"lhs_contracting_dims=\{([\d,]*)\}")
    if i.opcode == "custom-call":
        return _library(i, operands)
    return 0.0


def _dot(i: hlo.Instruction, operands: list[hlo.Array], pattern: str) -> float:
    dims = re.findall(r"\d+", i.field(pattern) or "")
    depth = math.prod(operands[0].shape[int(d)] for d in dims)
    return 2.0 * depth * math.prod(i.arrays[0].shape)


def _library(i: hlo.Instruction, operands: list[hlo.Array]) -> float:
    """Counts a call of cuBLAS or cuDNN."""
    target = i.field(r'custom_call_target="([^"]*)"') or ""
    if "cublas" in target:
        return _dot(i, operands, r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    if "fmha" in target:
        return _attention(operands, backward="Backward" in target)
    if "conv" in target and "BackwardInput" in target:
        return _convolution(i, [i.arrays[0], operands[1]], operands[0])
    if "conv" in target and "BackwardFilter" in target:
        return _convolution(i, [operands[0], i.arrays[0]], operands[1])
    if "conv" in target:
        return _convolution(i, operands)
    return 0.0


def _attention(operands: list[hlo.Array], *, backward: bool) -> float:
    """Counts fused attention: q k' and its product with v, or their gradients."""
    q, k = operands[0].shape, operands[1].shape
    batch, rows, heads, width = q[0], q[1], q[2], q[3]
    if k[1] == q[1] and rows < heads:  # (b, heads, n, d) in place of (b, n, heads, d).
        rows, heads = heads, rows
    columns = max(k[1], k[2]) if k[3] == width else k[3]
    return (10.0 if backward else 4.0) * batch * heads * rows * columns * width


def _convolution(
    i: hlo.Instruction, operands: list[hlo.Array], out: hlo.Array | None = None
) -> float:
    """Counts a convolution; TPU programs write matrix products as such.

    Only what multiplies data: padding and the zeros of dilation are left out.
    """
    labels = i.field(r"dim_labels=(\w+_\w+->\w+)")
    if labels is None:
        return 0.0
    left, right = labels.split("_")
    right, result = right.split("->")
    lhs, rhs = operands[0].shape, operands[1].shape
    shape = (out or i.arrays[0]).shape
    total = 2.0 * shape[result.index("b")] * shape[result.index("f")]
    total *= rhs[right.index("i")]
    window = i.field(r"window=\{([^}]*)\}") or ""
    for axis in sorted(c for c in left if c.isdigit()):
        sizes = (lhs[left.index(axis)], rhs[right.index(axis)])
        total *= _overlap(*sizes, shape[result.index(axis)], window, int(axis))
    return total


def _overlap(rows: int, kernel: int, out: int, window: str, axis: int) -> int:
    """Counts pairs of an output row and a kernel row that meet data, on one axis."""

    def option(name: str, default: str) -> str:
        found = re.search(rf"(?:^| ){name}=(\S+)", window)
        return found[1].split("x")[axis] if found else default

    low = int(option("pad", "0_0").split("_")[0])
    stride, spread = int(option("stride", "1")), int(option("lhs_dilate", "1"))
    dilate = int(option("rhs_dilate", "1"))
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None] * dilate
    inside = (at >= 0) & (at <= (rows - 1) * spread) & (at % spread == 0)
    return int(inside.sum())


def hbm_bytes(program: hlo.Program, computation: str, i: hlo.Instruction) -> float:
    """Counts the bytes that an instruction reads from and writes to HBM.

    Of what a fusion only slices, the slice; of what it updates in place, the update.
    """
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0.0
    operands = program.operands(computation, i)
    if i.opcode == "fusion":
        return _fusion_bytes(program, i, operands)
    if i.opcode in _SLICES or i.opcode == "slice-start":
        moved = i.arrays[-2:][:1] if i.opcode == "slice-start" else i.arrays[:1]
        return 2 * sum(a.bytes for a in moved)
    if i.opcode == "copy-start":  # Returns the copy, the original and a flag.
        return sum(a.bytes for a in i.arrays[:2] if not a.on_chip)
    if i.opcode == "dynamic-update-slice":
        return 2 * _size(operands[1].arrays) if len(operands) > 1 else 0.0
    # Beside its result, a library call returns its workspace, bytes in a row.
    results = tuple(a for a in i.arrays if (a.dtype, len(a.shape)) != ("s8", 1))
    return _size(results) + sum(_size(x.arrays) for x in operands)


def _size(arrays: tuple[hlo.Array, ...]) -> float:
    return sum(a.bytes for a in arrays if not a.on_chip)


def _fusion_bytes(
    program: hlo.Program, i: hlo.Instruction, operands: list[hlo.Instruction]
) -> float:
    inner = i.called.get("calls", "")
    body = program.computations.get(inner, [])
    users: dict[str, list[hlo.Instruction]] = {}
    for each in body:
        for name in each.operands:
            users.setdefault(name, []).append(each)
    parameters = {int(each.text): each for each in body if each.opcode == "parameter"}
    total = 0.0
    for position, operand in enumerate(operands):
        size = _size(operand.arrays)
        if size and position in parameters:
            size = min(size, _read(parameters[position], users))
        total += size
    return total + _written(program, inner, i)


def _read(parameter: hlo.Instruction, users: dict[str, list[hlo.Instruction]]) -> float:
    """Returns the bytes of a fusion's parameter that its body reads."""
    total = 0.0
    for user in users.get(parameter.name, []):
        if user.opcode in _SLICES:
            total += sum(a.bytes for a in user.arrays)
        elif user.opcode == "dynamic-update-slice":
            if user.operands[0] != parameter.name:
                return math.inf
        elif user.opcode in _VIEWS and users.get(user.name):
            total += _read(user, users)
        else:
            return math.inf
    return total


def _written(program: hlo.Program, inner: str, i: hlo.Instruction) -> float:
    if inner not in program.computations:
        return _size(i.arrays)
    root = program.root(inner)
    known = program.by_name[inner]
    results = [known[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(i.arrays):
        return _size(i.arrays)
    total = 0.0
    for result, array in zip(results, i.arrays, strict=True):
        while result.opcode in _VIEWS and result.operands[0] in known:
            result = known[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            update = known.get(result.operands[1])
            array = update.arrays[0] if update else array
            total += array.bytes
        elif not array.on_chip:
            total += array.bytes
    return total
