"""A compiled program's text as computations of instructions.

The text is that of `jax.stages.Compiled.as_text()`: XLA's HLO after scheduling, for a
TPU or GPU. Only what the cost of a program depends on is kept.
"""

import dataclasses
import functools
import math
import re

# Lines that every product goes through: their callers say more.
HELPERS = ("layers/linear.py", "layers/partition.py", "layers/stack.py")
BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"(\w+)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type, shape and memory of one array.

    Attributes:
        dtype: As in HLO, "bf16".
        shape: Its dimensions.
        on_chip: Whether it lies in a TPU's vector memory, not in HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> float:
        """Size without padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = BITS.get(self.dtype, int(digits[0]) if digits else 32)
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Without the percent sign.
        opcode: Such as "fusion".
        arrays: What it returns, a tuple flattened.
        operands: Names of its operands.
        rest: The line after the operands: attributes, metadata, backend_config.
        is_root: Whether it is what the computation returns.
        text: What stands between its parentheses.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool
    text: str

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations by role: "calls", "body", "condition", "to_apply"."""
        head = self.rest.split("backend_config=")[0].split("metadata=")[0]
        return dict(_CALLED.findall(head))

    @property
    def branches(self) -> list[str]:
        """Computations of a conditional."""
        found = _BRANCHES.search(self.rest)
        if found:
            return [name.strip(" %") for name in found[1].split(",")]
        roles = ("true_computation", "false_computation")
        return [self.called[role] for role in roles if role in self.called]

    def field(self, pattern: str) -> str | None:
        """Returns the first group of a pattern in the attributes, if it is there."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    @property
    def cycles(self) -> float:
        """Cycles that the TPU compiler estimates; 0 where it says nothing."""
        return float(self.field(r'"estimated_cycles":"?(\d+)') or 0)


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed text.

    Attributes:
        computations: Instructions in schedule order, by computation.
        entry: Name of the one that runs.
        frames: Source line of every stack frame; see `source`.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    frames: dict[int, tuple[str, int, str, int]]

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """Instructions of every computation by name."""
        items = self.computations.items()
        return {name: {i.name: i for i in body} for name, body in items}

    def operands(self, computation: str, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions whose results an instruction takes."""
        known = self.by_name[computation]
        return [known[name] for name in instruction.operands if name in known]

    def root(self, computation: str) -> Instruction:
        """Returns what a computation returns."""
        body = self.computations[computation]
        return next((i for i in body if i.is_root), body[-1])

    def trips(self, loop: Instruction) -> int:
        """Returns how often a `while` runs; 1 where its text does not say.

        GPU programs say it; in those for a TPU it is the constant that the condition
        compares the counter with.
        """
        known = loop.field(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        bounds = []
        pending = [loop.called.get("condition", "")]
        while pending:
            for i in self.computations.get(pending.pop(), []):
                if i.opcode == "constant" and i.arrays[0].dtype in ("s32", "u32"):
                    bounds += [int(n) for n in re.findall(r"^-?\d+$", i.text)]
                if "calls" in i.called:
                    pending.append(i.called["calls"])
        return max([1, *bounds])

    def source(self, instruction: Instruction, package: str = "rae_jax") -> str:
        """Returns "layers/mlp.py:41 Mlp.__call__", the innermost line of a package.

        That of `HELPERS` or of another package where the stack has nothing else, and
        the opcode where there is no stack.
        """
        frame = int(instruction.field(r"stack_frame_id=(\d+)") or 0)
        first = None
        while frame in self.frames:
            file, line, function, frame = self.frames[frame]
            inside = file.rpartition(f"/{package}/")
            name = inside[2] if inside[0] else file.rpartition("/")[2]
            label = f"{name}:{line} {function}".strip()
            if inside[0] and name not in HELPERS:
                return label
            first = first or label
        return first or f"({instruction.opcode})"


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    Raises:
        ValueError: It is not one.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if body is None or line.startswith(("%", "ENTRY")):
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                body = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            body = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                body.append(instruction)
    if not entry:
        raise ValueError("This is not the text of a compiled program: no ENTRY.")
    return Program(computations, entry, _frames(text))


def _instruction(line: str) -> Instruction | None:
    start = _NAME.match(line)
    if start is None:
        return None
    rest = line[start.end() :]
    cut = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    types, rest = rest[:cut], rest[cut:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside = _COMMENT.sub("", rest[len(opcode) + 1 : end])
    return Instruction(
        name=start[2],
        opcode=opcode,
        arrays=arrays(types),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        rest=rest[end + 1 :],
        is_root=bool(start[1]),
        text=inside.strip(),
    )


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def arrays(text: str) -> tuple[Array, ...]:
    """Reads types such as `(bf16[2,8]{1,0:T(8,128)S(1)}, f32[])`."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(_COMMENT.sub("", text)):
        sizes = tuple(int(n) for n in re.findall(r"\d+", shape))
        found.append(Array(dtype, sizes, "S(1)" in layout))
    return tuple(found)


def _frames(text: str) -> dict[int, tuple[str, int, str, int]]:
    """Returns (file, line, function, parent) of every frame in the text's tables."""

    def table(name: str) -> list[str]:
        found = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.M)
        return found[1].splitlines() if found else []

    def number(line: str, key: str) -> int:
        found = re.search(rf"{key}=(\d+)", line)
        return int(found[1]) if found else 0

    def split(lines: list[str]) -> dict[int, str]:
        return {int(k): v.strip('"') for k, _, v in (x.partition(" ") for x in lines)}

    files, functions = split(table("FileNames")), split(table("FunctionNames"))
    places = {
        key: (
            files.get(number(line, "file_name_id"), ""),
            number(line, "line"),
            functions.get(number(line, "function_name_id"), ""),
        )
        for key, line in split(table("FileLocations")).items()
    }
    return {  # Parents are numbered from one, with one for none.
        key: (
            *places.get(number(line, "file_location_id"), ("", 0, "")),
            number(line, "parent_frame_id") - 1,
        )
        for key, line in split(table("StackFrames")).items()
    }
