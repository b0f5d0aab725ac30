"""What a compiled program moves in memory and sends to other devices, read from optimized HLO."""

from collections.abc import Iterator
import dataclasses
import math
import re
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+)[^=]*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")  # a layout's parentheses follow no space
_CALLEES = re.compile(
    r"\b(body|condition|to_apply|calls|called_computations|branch_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
# Names of what another instruction made: nothing runs.
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "add-dependency",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "domain",
    }
)
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)')
_NAMES = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        bytes: of its operands on one device, of all of them where XLA merged several. In a ring a
            device sends 2 (n - 1) / n of that for an all-reduce, (n - 1) / n for a reduce-scatter.
        trips: times that a call of the program runs it.
        conditional: whether it stands in a branch, which not every call takes.
    """

    kind: str
    bytes: int
    trips: int
    conditional: bool


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    operands: str
    attributes: str


def collectives(text: str) -> list[Collective]:
    """Returns the collectives that a call of a program runs.

    Fusions and calls run their computations once, and a loop its body as often as it has trips. Of
    a conditional all branches are listed, and what is in them is marked; so is the body of a loop
    of which the compiler does not know the trips, taken to have no or one.

    Args:
        text: `compiled.as_text()`.

    Raises:
        ValueError: if `text` is no program.
    """
    computations, entry = _read(text)
    return list(_walk(computations, entry, 1, False))


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a call of a program with one conditional step reads from memory and writes to it.

    Attributes:
        hold: bytes of a call that does not take the step.
        release: bytes of a call that does.
        kernels_of_hold: instructions that move a thousandth of `release` or more, in a hold.
        kernels_of_release: the same in a release.
    """

    hold: int
    release: int
    kernels_of_hold: int
    kernels_of_release: int


def moved(text: str) -> Moved:
    """Returns the bytes that a call moves: operands and results of all that is not in a fusion.

    A step is what stands in a branch, the largest of a conditional, or in a loop of which the
    compiler does not know the trips, taken to have one. Arrays that the program keeps on the chip
    (the memory space 1 of a TPU) move nothing.

    Args:
        text: `compiled.as_text()`.

    Raises:
        ValueError: if `text` is no program.
    """
    computations, entry = _read(text)
    always, step = _sizes(computations, entry)
    hold, release = sum(always), sum(always) + sum(step)
    kernels, more = (sum(size >= release / 1000 for size in sizes) for sizes in (always, step))
    return Moved(hold, release, kernels, kernels + more)


def _sizes(
    computations: dict[str, dict[str, _Instruction]], name: str
) -> tuple[list[int], list[int]]:
    """Returns the bytes of each instruction that always runs, and of each that a step runs."""
    instructions = computations[name]
    always, step = [], []
    for shape, opcode, operands, attributes in instructions.values():
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            continue
        callees = {}
        for attribute, several, single in _CALLEES.findall(attributes):
            callees.setdefault(attribute, []).extend(_NAMES.findall(several or single))
        if opcode == "conditional":
            branches = [b for names in callees.values() for b in names]
            step += max((_all(computations, branch) for branch in branches), key=sum)
        elif opcode == "while":
            (body,), (condition,) = callees["body"], callees["condition"]
            trips = _TRIPS.search(attributes)
            always += _all(computations, condition)
            if trips:
                inside = _sizes(computations, body)
                always += inside[0] * int(trips[1])
                step += inside[1] * int(trips[1])
            else:
                step += _all(computations, body)
        elif opcode == "call":
            for names in callees.values():
                inside = _sizes(computations, names[0])
                always, step = always + inside[0], step + inside[1]
        else:
            reads = [_bytes(instructions[x].shape, True) for x in _NAMES.findall(operands)]
            # What starts a copy names its source and its target; it reads one and writes one.
            writes = reads[0] if opcode in ("copy-start", "slice-start") else _bytes(shape, True)
            always.append(sum(reads) + writes)
    return always, step


def _all(computations: dict[str, dict[str, _Instruction]], name: str) -> list[int]:
    always, step = _sizes(computations, name)
    return always + step


def _read(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Returns the instructions of each computation by name, and the computation that is called."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, body = None, {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():  # `/*index=5*/` in long tuples
        if found := _INSTRUCTION.match(line):
            body[found["name"]] = _parse(found["rest"])
        elif found := _COMPUTATION.match(line):
            body = computations[found["name"]] = {}
            entry = found["name"] if found["entry"] else entry
    if entry is None:
        raise ValueError("`text` has no ENTRY computation; pass `compiled.as_text()`")
    return computations, entry


def _parse(text: str) -> _Instruction:
    found = _OPCODE.search(text)
    if found is None:
        raise ValueError(f"cannot read this instruction: {text}")
    depth, end = 1, found.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    operands, attributes = text[found.end() : end - 1], text[end:]
    return _Instruction(text[: found.start()], found[1], operands, attributes)


def _walk(
    computations: dict[str, dict[str, _Instruction]],
    name: str,
    trips: int,
    conditional: bool,
) -> Iterator[Collective]:
    instructions = computations[name]
    for _, opcode, operands, attributes in instructions.values():
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            size = sum(_bytes(instructions[name].shape) for name in _NAMES.findall(operands))
            yield Collective(kind, size, trips, conditional)
        if opcode.endswith(("-done", "-update")):
            continue  # its start names the same computation
        times, step = trips, False
        if opcode == "while":
            known = _TRIPS.search(attributes)
            times, step = trips * int(known[1]) if known else trips, not known
        for attribute, several, single in _CALLEES.findall(attributes):
            for callee in _NAMES.findall(several or single):
                branch = conditional or step or attribute in _BRANCHES
                yield from _walk(computations, callee, times, branch)


def _bytes(shape: str, memory_only: bool = False) -> int:
    """Returns the bytes of an array, or of all in a tuple, from a text such as `f32[4,2]{1,0}`.

    With `memory_only` without those that a TPU keeps on the chip, in its memory space 1.
    """
    total = 0
    for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if memory_only and "S(1)" in layout:
            continue
        bits = re.search(r"\d+", dtype)
        size = 1 if dtype == "pred" else math.ceil(int(bits[0]) / 8) if bits else 0
        total += size * math.prod(int(n) for n in dims.split(",") if n)
    return total
