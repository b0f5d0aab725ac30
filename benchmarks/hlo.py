"""Read from optimized HLO the bytes that a program moves in memory and sends to other devices.

A program has instructions that always run and one *step*, which only some calls take. The step
stands in a branch, the largest of a conditional, or in a loop whose trips the compiler does not
know, taken to have one. Other loops run as often as they have trips.
"""

from collections.abc import Collection, Iterator
import dataclasses
import functools
from itertools import permutations
import math
import re
from typing import Any

KINDS = {
    *("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+)[^=]*\{$")
# A layout's parentheses follow no space, and those of the operands end before an attribute.
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w\-]*)"
    r"\((?P<operands>.*?)\)(?P<attributes>, [\w\-]+=.*)?$"
)
_CALLEES = re.compile(
    r"\b(body|condition|to_apply|calls|called_computations|branch_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAMES = re.compile(r"%([\w.\-]+)")
_ARRAYS = re.compile(r"\b(pred|[a-z]+(\d*)\w*)\[([\d,]*)\](\{[^}]*\})?")
# These name arrays that another instruction made, or end what is counted where it starts.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|domain|add-dependency"
    r"|partition-id|replica-id|opt-barrier|.*-(done|update)"
)

_ANY = re.compile(r".*")
_MOVES = re.compile(r"bitcast|reshape|transpose|copy|convert|broadcast|copy-start|copy-done")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, or several that XLA merged."""

    kind: str  # one of `KINDS`
    bytes: int  # of its operands on one device
    trips: int  # times that a call of the program runs it
    conditional: bool  # whether it stands in the step, which not every call takes


@dataclasses.dataclass(frozen=True)
class Moved:
    """The bytes that a call of a program reads from memory and writes to it."""

    hold: int  # of a call that does not take the step
    release: int  # of a call that does
    kernels_of_hold: int  # instructions that move a thousandth of `release` or more
    kernels_of_release: int


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, from `compiled.as_text()`."""
    program, found, seen = _Program(text), [], set()
    for in_step, runs in enumerate(program.runs(program.entry)):
        for instruction, times in runs:
            for kind, size, channel in program.collectives_in(instruction):
                # A TPU starts one in a fusion, goes on with it in others and ends it in the last.
                if channel is None or channel not in seen:
                    found.append(Collective(kind, size, times, bool(in_step)))
                    seen.add(channel)
    return found


def moved(text: str) -> Moved:
    """Returns the bytes that a call moves: operands and results of all that is not in a fusion.

    Arrays that the program keeps on the chip (the memory space 1 of a TPU) move nothing. The text
    is that of `compiled.as_text()`.
    """
    program = _Program(text)
    always, step = program.runs(program.entry)
    hold, both = _bytes(always), _bytes(always + step)
    kernels, more = (
        sum(times for one, times in runs if one.bytes >= both / 1000) for runs in (always, step)
    )
    return Moved(hold, both, kernels, kernels + more)


def forgotten(text: str) -> list[str]:
    """Returns the arrays that a loop carries and that all devices but one set to zero in each trip.

    That is openxla/xla issue 49143: for a sum of scatters, the partitioner of XLA lets one device
    go on with the sum and all others begin with zeros, and reduces. If the reduction is then moved
    behind the loop, `select(partition_id == 0, carry, 0)` stays in it, and loses what these devices
    had summed. Each array is named by its shape. The text is that of `compiled.as_text()`.
    """
    program = _Program(text)
    return [
        program.root(body).body[result].shape
        for instructions in program.computations.values()
        for loop in instructions.values()
        if loop.opcode == "while"
        for body in loop.callees("body")
        for i, result in enumerate(program.root(body).names)
        for one, within, _ in program.behind(program.root(body).body[result], (loop,), stop=KINDS)
        if one.opcode == "select" and program.forgets(one, within, i)
    ]


@dataclasses.dataclass(eq=False)
class _Instruction:
    computation: str
    body: dict[str, "_Instruction"]  # of that computation, by name
    name: str
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

    @property
    def names(self) -> list[str]:
        """The names of its operands."""
        return _NAMES.findall(self.operands)

    def reads(self, on_chip: bool = False) -> list[int]:
        """Returns the bytes of each operand."""
        return [_size(self.body[name].shape, on_chip) for name in self.names]

    @functools.cached_property
    def bytes(self) -> int:
        """The bytes of its operands and results."""
        # The start of a copy names its source and its target; it reads one and writes one.
        copies = self.opcode in ("copy-start", "slice-start")
        return sum(self.reads()) + (self.reads()[0] if copies else _size(self.shape))


_Runs = list[tuple[_Instruction, int]]  # and how many times each of them runs


class _Program:
    """A program, taken apart: `computations` by name, their instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry, name = "", ""
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():  # `/*index=5*/` in long tuples
            if found := _INSTRUCTION.match(line):
                body = self.computations[name]
                body[found["name"]] = _Instruction(name, body, **found.groupdict(""))
            elif found := _COMPUTATION.match(line):
                name = found["name"]
                self.computations[name] = {}
                self.entry = name if found["entry"] else self.entry
            elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
                raise ValueError(f"cannot read this instruction: {line}")
        if not self.entry:
            raise ValueError("`text` has no ENTRY computation; pass `compiled.as_text()`")

    @functools.cache  # noqa: B019  (programs are short-lived)
    def runs(self, name: str) -> tuple[_Runs, _Runs]:
        """Returns the instructions that a computation always runs, and those of its step."""
        always, step = [], []
        for instruction in self.computations[name].values():
            if _FREE.fullmatch(instruction.opcode):
                continue
            if instruction.opcode == "conditional":
                branches = [self._both(branch) for branch in instruction.callees()]
                step += max(branches, key=self._dearness)
            elif instruction.opcode == "while":
                (condition,), (body,) = map(instruction.callees, ("condition", "body"))
                always += self._both(condition)
                if trips := self._trips(instruction):
                    for runs, inside in zip((always, step), self.runs(body), strict=True):
                        runs += [(one, trips * times) for one, times in inside]
                else:
                    step += self._both(body)
            elif instruction.opcode == "call":
                for callee in instruction.callees("to_apply"):
                    inside = self.runs(callee)
                    always, step = always + inside[0], step + inside[1]
            else:
                always.append((instruction, 1))
        return always, step

    def root(self, name: str) -> _Instruction:
        """Returns the last instruction of a computation."""
        return list(self.computations[name].values())[-1]

    def behind(
        self,
        start: _Instruction,
        within: tuple[_Instruction, ...],
        *,
        only: re.Pattern = _ANY,
        stop: Collection[str] = (),
    ) -> Iterator[tuple[_Instruction, tuple[_Instruction, ...], int | None]]:
        """Yields what an instruction is made of: those behind it, in fusions and before loops too.

        Args:
            start: where to begin.
            within: the loops and fusions that it stands in, outermost first.
            only: the operations to go through.
            stop: those not to go through, and then no loop is left either.

        Yields:
            Each instruction, what it stands in, and which element of it was taken, if one was.
        """
        ahead: list[Any] = [(start, within, None)]
        seen = set()
        while ahead:
            found = one, within, index = ahead.pop()
            if found in seen:
                continue
            seen.add(found)
            yield found
            kind = one.opcode.removesuffix("-start")
            if one.opcode == "parameter" and within:
                *outer, caller = within
                name = caller.names[0 if caller.opcode == "while" else int(one.operands)]
                if not (stop and caller.opcode == "while"):
                    ahead.append((caller.body[name], tuple(outer), index))
            elif one.opcode == "get-tuple-element":
                (index,) = re.findall(r"index=(\d+)", one.attributes)
                ahead.append((one.body[one.names[0]], within, int(index)))
            elif index is not None and one.opcode in ("tuple", "while"):
                name = one.names[index if one.opcode == "tuple" else 0]
                ahead.append((one.body[name], within, None if one.opcode == "tuple" else index))
            elif one.opcode in ("fusion", "call"):
                (callee,) = one.callees("calls", "to_apply")
                ahead.append((self.root(callee), (*within, one), index))
            elif kind not in stop and only.fullmatch(one.opcode):
                ahead += [(one.body[name], within, None) for name in one.names]

    def forgets(self, select: _Instruction, within: tuple[_Instruction, ...], i: int) -> bool:
        """Returns whether each device chooses for itself between carry `i` of a loop and zero."""
        predicate, *branches = (
            list(self.behind(select.body[name], within, only=only))
            for name, only in zip(select.names, (_ANY, _MOVES, _MOVES), strict=True)
        )
        ends = {(self._is_carry(a, within, i), self._is_zero(b)) for a, b in permutations(branches)}
        return (True, True) in ends and any(one.opcode == "partition-id" for one, *_ in predicate)

    def _is_carry(self, branch: list, within: tuple[_Instruction, ...], i: int) -> bool:
        return any((one.opcode, w, at) == ("parameter", within[:1], i) for one, w, at in branch)

    def _is_zero(self, branch: list) -> bool:
        return any(re.fullmatch("constant -?0", f"{x.opcode} {x.operands}") for x, *_ in branch)

    def _both(self, name: str) -> _Runs:
        always, step = self.runs(name)
        return always + step

    def _dearness(self, runs: _Runs) -> tuple[bool, int]:
        """Returns a key that puts branches that send above others, and else those that move."""
        return any(list(self.collectives_in(one)) for one, _ in runs), _bytes(runs)

    def collectives_in(
        self, instruction: _Instruction, fused: bool = False
    ) -> Iterator[tuple[str, int, str | None]]:
        """Yields kind, bytes and, in a fusion, channel of a collective, or of those inside it."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            if instruction.computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as a TPU fuses one
            channel = _CHANNEL.search(instruction.attributes) if fused else None
            yield kind, sum(instruction.reads(on_chip=True)), channel and channel[1]
            return
        fused = fused or instruction.opcode == "fusion"
        for callee in instruction.callees("calls", "called_computations"):
            for inner in self.computations[callee].values():
                yield from self.collectives_in(inner, fused)

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


def _bytes(runs: _Runs) -> int:
    return sum(instruction.bytes * times for instruction, times in runs)


def _size(shape: str, on_chip: bool = False) -> int:
    """Returns the bytes of an array, or of all in a tuple, from a text such as `f32[4,2]{1,0}`.

    Those that a TPU keeps on the chip, in its memory space 1, count if `on_chip`.
    """
    return sum(
        (1 if dtype == "pred" else math.ceil(int(bits or 0) / 8))
        * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, bits, dims, layout in _ARRAYS.findall(shape)
        if on_chip or "S(1)" not in layout
    )
