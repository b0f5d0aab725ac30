"""Read from optimized HLO the bytes that a program moves in memory and sends to other devices.

A program has instructions that always run and one *step*, which only some calls take. The step
stands in a branch, the largest of a conditional, or in a loop whose trips the compiler does not
know, taken to have one. Other loops run as often as they have trips.
"""

from collections.abc import Iterator
import dataclasses
import functools
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
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAMES = re.compile(r"%([\w.\-]+)")
_ARRAYS = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
# These name arrays that another instruction made: nothing runs.
_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
        *("add-dependency", "partition-id", "replica-id", "opt-barrier"),
    }
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        bytes: of its operands on one device, of all of them where XLA merged several. In a ring a
            device sends 2 (n - 1) / n of that for an all-reduce, (n - 1) / n for a reduce-scatter.
        trips: times that a call of the program runs it.
        conditional: whether it stands in the step, which not every call takes.
    """

    kind: str
    bytes: int
    trips: int
    conditional: bool


@dataclasses.dataclass(frozen=True)
class Moved:
    """The bytes that a call of a program reads from memory and writes to it.

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


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program.

    Args:
        text: `compiled.as_text()`.

    Raises:
        ValueError: if `text` is no program.
    """
    program, found, seen = _Program(text), [], set()
    for in_step, runs in zip((False, True), program.runs(program.entry), strict=True):
        for run in runs:
            for kind, size, channel in program.collectives_in(run.computation, run.name):
                # A TPU starts one in a fusion, goes on with it in others and ends it in the last.
                if channel is None or channel not in seen:
                    found.append(Collective(kind, size, run.times, in_step))
                    seen.add(channel)
    return found


def moved(text: str) -> Moved:
    """Returns the bytes that a call moves: operands and results of all that is not in a fusion.

    Arrays that the program keeps on the chip (the memory space 1 of a TPU) move nothing.

    Args:
        text: `compiled.as_text()`.

    Raises:
        ValueError: if `text` is no program.
    """
    program = _Program(text)
    always, step = program.runs(program.entry)
    hold, both = (sum(run.bytes * run.times for run in runs) for runs in (always, always + step))
    large = [[run.times for run in runs if run.bytes >= both / 1000] for runs in (always, step)]
    return Moved(hold, both, sum(large[0]), sum(map(sum, large)))


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    operands: str
    attributes: str

    def callees(self, *attributes: str) -> list[str]:
        """Returns the computations that it names, as these attributes or as any."""
        return [
            name
            for attribute, several, single in _CALLEES.findall(self.attributes)
            for name in _NAMES.findall(several or f"%{single.removeprefix('%')}")
            if not attributes or attribute in attributes
        ]


class _Run(NamedTuple):
    computation: str
    name: str
    bytes: int
    times: int


class _Program:
    """A program, taken apart: `computations` by name, their instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        entry, body = None, {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():  # `/*index=5*/` in long tuples
            if found := _INSTRUCTION.match(line):
                body[found["name"]] = _parse(found["rest"])
            elif found := _COMPUTATION.match(line):
                body = self.computations[found["name"]] = {}
                entry = found["name"] if found["entry"] else entry
        if entry is None:
            raise ValueError("`text` has no ENTRY computation; pass `compiled.as_text()`")
        self.entry = entry

    @functools.cache  # noqa: B019  (programs are short-lived)
    def runs(self, name: str) -> tuple[list[_Run], list[_Run]]:
        """Returns the instructions that a computation always runs, and those of its step."""
        always, step = [], []

        def both(runs: tuple[list[_Run], list[_Run]]) -> list[_Run]:
            return runs[0] + runs[1]

        for own, instruction in self.computations[name].items():
            opcode = instruction.opcode
            if opcode in _FREE or opcode.endswith(("-done", "-update")):
                continue  # counted where it starts
            if opcode == "conditional":
                branches = [both(self.runs(branch)) for branch in instruction.callees()]
                step += max(branches, key=self._dearness)
            elif opcode == "while":
                (condition,), (body,) = map(instruction.callees, ("condition", "body"))
                always += both(self.runs(condition))
                inside, trips = self.runs(body), self._trips(instruction)
                always += _repeated(inside[0], trips) if trips else []
                step += _repeated(inside[1], trips) if trips else both(inside)
            elif opcode == "call":
                for callee in instruction.callees("to_apply"):
                    inside = self.runs(callee)
                    always, step = always + inside[0], step + inside[1]
            else:
                always.append(_Run(name, own, self._bytes(name, instruction), 1))
        return always, step

    def _dearness(self, runs: list[_Run]) -> tuple[bool, int]:
        """Returns a key that puts branches that send above others, and else those that move."""
        sends = any(list(self.collectives_in(run.computation, run.name)) for run in runs)
        return sends, sum(run.bytes * run.times for run in runs)

    def collectives_in(
        self, computation: str, name: str, fused: bool = False
    ) -> Iterator[tuple[str, int, str | None]]:
        """Yields kind, bytes and, in a fusion, channel of a collective, or of those inside it."""
        instruction = self.computations[computation][name]
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            if computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as a TPU fuses one
            channel = _CHANNEL.search(instruction.attributes) if fused else None
            size = sum(self._operands(computation, instruction, on_chip=True))
            yield kind, size, channel and channel[1]
            return
        fused = fused or instruction.opcode == "fusion"
        for callee in instruction.callees("calls", "called_computations"):
            for inner in self.computations[callee]:
                yield from self.collectives_in(callee, inner, fused)

    def _trips(self, loop: _Instruction) -> int | None:
        """Returns the trips of a loop, if the compiler says it or its condition counts to them."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        instructions = self.computations[loop.callees("condition")[0]]
        root = list(instructions.values())[-1]
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, end = (instructions[name] for name in _NAMES.findall(root.operands))
        counts = counter.opcode == "get-tuple-element" and end.opcode == "constant"
        return int(end.operands) if counts else None

    def _bytes(self, computation: str, instruction: _Instruction) -> int:
        reads = self._operands(computation, instruction)
        # The start of a copy names its source and its target; it reads one and writes one.
        copies = instruction.opcode in ("copy-start", "slice-start")
        return sum(reads) + (reads[0] if copies else _size(instruction.shape))

    def _operands(
        self, computation: str, instruction: _Instruction, on_chip: bool = False
    ) -> list[int]:
        names = _NAMES.findall(instruction.operands)
        return [_size(self.computations[computation][name].shape, on_chip) for name in names]


def _repeated(runs: list[_Run], trips: int) -> list[_Run]:
    return [run._replace(times=trips * run.times) for run in runs]


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


def _size(shape: str, on_chip: bool = False) -> int:
    """Returns the bytes of an array, or of all in a tuple, from a text such as `f32[4,2]{1,0}`.

    Args:
        shape: the text.
        on_chip: whether those count that a TPU keeps on the chip, in its memory space 1.
    """
    total = 0
    for dtype, dims, layout in _ARRAYS.findall(shape):
        if "S(1)" in layout and not on_chip:
            continue
        bits = re.search(r"\d+", dtype)
        size = 1 if dtype == "pred" else math.ceil(int(bits[0]) / 8) if bits else 0
        total += size * math.prod(int(n) for n in dims.split(",") if n)
    return total
