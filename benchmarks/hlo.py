"""Read from optimized HLO the bytes that a program moves in memory and sends to other devices.

A program has instructions that always run and one *step*, which only some calls take. The step
stands in a branch, the largest of a conditional, or in a loop whose trips the compiler does not
know, taken to have one. Other loops run as often as they have trips.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
import dataclasses
import functools
import math
import re

KINDS = {
    *("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+)[^=]*\{$")
# A layout's parentheses follow no space; the operands' end before an attribute.
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w\-]*)"
    r"\((?P<arguments>.*?)\)(?P<attributes>, [\w\-]+=.*)?$"
)
_CALLEES = re.compile(
    r"\b(body|condition|to_apply|calls|called_computations|branch_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_GROUP = re.compile(
    r"replica_groups=(?:\{\{(?P<ids>[\d,]+)\}|\[\d+,(?P<size>\d+)\]<="
    r"|mesh\[(?P<mesh>.*?)\] \{(?P<axes>.*?)\})"
)
_NAMES = re.compile(r"%([\w.\-]+)")
_ARRAYS = re.compile(r"\b(pred|[a-z]+(\d*)\w*)\[([\d,]*)\](\{[^}]*\})?")
# These name arrays that another instruction made, or end what is counted at its start.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|domain|add-dependency"
    r"|partition-id|replica-id|opt-barrier|.*-(done|update)"
)
# What these read and write: of themselves (0) and their operands the one that is a slice.
_TWICE = {"dynamic-slice": 0, "copy-start": 1, "slice-start": 1, "dynamic-update-slice": 2}
_MOVES = re.compile(r"(bitcast|reshape|transpose|copy|convert|broadcast|copy-(start|done))$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, or several that XLA merged."""

    kind: str  # one of `KINDS`
    bytes: int  # of its operands on one device
    trips: int  # times that a call of the program runs it
    conditional: bool  # whether it stands in the step, which not every call takes
    group: int | None = None  # devices that it runs between, if the program says how many


@dataclasses.dataclass(frozen=True)
class Moved:
    """The bytes that a call of a program reads from memory and writes to it."""

    hold: int  # of a call that does not take the step
    release: int  # of a call that does


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, from `compiled.as_text()`."""
    program, found, seen = _Program(text), [], set()
    for one, times, in_step in program.runs():
        for kind, size, channel, group in program.collectives_in(one):
            # A TPU starts one in a fusion, goes on with it in others and ends it in the last.
            if channel is None or channel not in seen:
                found.append(Collective(kind, size, times, in_step, group))
                seen.add(channel)
    return found


def moved(text: str) -> Moved:
    """Returns the bytes of operands and results of all that is not in a fusion.

    An array that is sliced, or updated in place, counts with its slice. Arrays that the program
    keeps on the chip (the memory space 1 of a TPU) move nothing.
    """
    program = _Program(text)
    runs = [(program.bytes(one), times, in_step) for one, times, in_step in program.runs()]
    release = sum(size * times for size, times, _ in runs)
    hold = sum(size * times for size, times, in_step in runs if not in_step)
    return Moved(hold, release)


def hidden(text: str) -> tuple[int, int]:
    """Returns how many collectives a GPU runs beside a product, and how many there are.

    Instructions of a scheduled program run in the order of its text.
    """
    program, found = _Program(text), []
    for body in program.computations.values():
        order = list(body.values())
        for at, one in enumerate(order):
            if one.opcode.endswith("-start") and any(program.collectives_in(one)):
                done = (x for x in one.users if x.opcode.endswith("-done"))
                between = order[at : order.index(next(done))]
                found.append(any("gemm" in x.name + x.attributes for x in between))
    return sum(found), len(found)


def forgotten(text: str) -> list[str]:
    """Returns the arrays that a loop carries and that all devices but one set to zero in each trip.

    That is openxla/xla issue 49143: for a sum of scatters, the partitioner of XLA lets one device
    go on with the sum and all others begin with zeros, and reduces. If the reduction is then moved
    behind the loop, `select(partition_id == 0, carry, 0)` stays in it, and loses what these devices
    had summed. Each array is named by its shape.
    """
    program = _Program(text)
    return [
        result.shape
        for instructions in program.computations.values()
        for loop in instructions.values()
        for root in map(program.root, loop.callees("body"))
        for i, result in enumerate(root.operands)
        for one, _ in program.behind(result, stop=KINDS)
        if one.opcode == "select" and program.forgets(one, root.body, i)
    ]


@dataclasses.dataclass(eq=False)
class _Instruction:
    computation: str
    body: dict[str, "_Instruction"]  # of that computation, by name
    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    users: list["_Instruction"] = dataclasses.field(default_factory=list, init=False)

    @functools.cached_property
    def operands(self) -> list["_Instruction"]:
        return [self.body[name] for name in _NAMES.findall(self.arguments)]

    @property
    def size(self) -> int:
        return _size(self.shape)

    def callees(self, *attributes: str) -> list[str]:
        """Returns the computations that it names, as these attributes or as any."""
        return [
            name
            for attribute, several, single in _CALLEES.findall(self.attributes)
            for name in _NAMES.findall(several or f"%{single.removeprefix('%')}")
            if not attributes or attribute in attributes
        ]


_Runs = list[tuple[_Instruction, int, bool]]  # how many times each runs, and if in the step


class _Program:
    """A program, taken apart: `computations` by name, their instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.callers: dict[str, list[_Instruction]] = defaultdict(list)
        self.entry, name = "", ""
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():  # `/*index=5*/` in long tuples
            if found := _INSTRUCTION.match(line):
                body = self.computations[name]
                one = body[found["name"]] = _Instruction(name, body, **found.groupdict(""))
                for operand in one.operands:
                    operand.users.append(one)
                for callee in one.callees():
                    self.callers[callee].append(one)
            elif found := _COMPUTATION.match(line):
                name = found["name"]
                self.computations[name] = {}
                self.entry = name if found["entry"] else self.entry
            elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
                raise ValueError(f"cannot read this instruction: {line}")
        if not self.entry:
            raise ValueError("`text` has no ENTRY computation; pass `compiled.as_text()`")

    def root(self, name: str) -> _Instruction:
        return list(self.computations[name].values())[-1]

    def runs(self, name: str = "") -> _Runs:
        """Returns the instructions that run in a computation, or in the whole program."""
        found: _Runs = []
        for one in self.computations[name or self.entry].values():
            if one.opcode == "conditional":
                dearest = max(map(self.runs, one.callees()), key=self._dearness)
                found += [(inside, times, True) for inside, times, _ in dearest]
            elif one.opcode == "while":
                (condition,), (body,) = map(one.callees, ("condition", "body"))
                found += [(inside, times, False) for inside, times, _ in self.runs(condition)]
                trips = self._trips(one)
                for inside, times, in_step in self.runs(body):
                    found.append((inside, times * (trips or 1), in_step or not trips))
            elif one.opcode == "call":
                found += [run for callee in one.callees("to_apply") for run in self.runs(callee)]
            elif not _FREE.fullmatch(one.opcode):
                found.append((one, 1, False))
        return found

    def _trips(self, loop: _Instruction) -> int | None:
        """Returns the trips of a loop, if the compiler says it or its condition counts to them."""
        if known := re.search(r'"known_trip_count":\s*\{"n":\s*"?(\d+)', loop.attributes):
            return int(known[1])
        root = self.root(loop.callees("condition")[0])
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, end = root.operands
        counts = counter.opcode == "get-tuple-element" and end.opcode == "constant"
        return int(end.arguments) if counts else None

    def _dearness(self, runs: _Runs) -> tuple[bool, int]:
        """Returns a key that puts branches that send above others, and else those that move."""
        size = sum(self.bytes(one) * times for one, times, _ in runs)
        return any(list(self.collectives_in(one)) for one, *_ in runs), size

    def bytes(self, one: _Instruction) -> int:
        """Returns the bytes that an instruction reads and writes."""
        if one.opcode in _TWICE:
            return 2 * (one, *one.operands)[_TWICE[one.opcode]].size
        if one.opcode != "fusion":
            return sum(operand.size for operand in one.operands) + one.size
        (callee,) = one.callees("calls")
        total = min(one.size, _written(self.root(callee)))
        for inside in self.computations[callee].values():
            if inside.opcode == "parameter":
                total += min(one.operands[int(inside.arguments)].size, _read(inside))
        return total

    def collectives_in(
        self, one: _Instruction, fused: bool = False
    ) -> Iterator[tuple[str, int, str | None, int | None]]:
        """Yields kind, bytes, channel (in a fusion) and group of a collective, or of all inside."""
        kind = one.opcode.removesuffix("-start")
        if kind in KINDS:
            if one.computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as a TPU fuses one
            channel = re.search(r"channel_id=(\d+)", one.attributes) if fused else None
            sizes = (_size(operand.shape, on_chip=True) for operand in one.operands)
            yield kind, sum(sizes), channel and channel[1], _group(one.attributes)
            return
        for callee in one.callees("calls", "called_computations"):
            for inside in self.computations[callee].values():
                yield from self.collectives_in(inside, fused or one.opcode == "fusion")

    def behind(
        self, start: _Instruction, only: re.Pattern = re.compile(""), stop: Collection[str] = ()
    ) -> Iterator[tuple[_Instruction, int | None]]:
        """Yields what an instruction is made of, and which element of it was taken, if one was.

        It goes through operations that match `only` and are not in `stop`, in fusions too, and out
        of loops unless there is something to stop at.
        """
        ahead: list[tuple[_Instruction, int | None]] = [(start, None)]
        seen = set()
        while ahead:
            found = one, index = ahead.pop()
            if found in seen:
                continue
            seen.add(found)
            yield found
            if one.opcode == "parameter":
                left = ("fusion", "call") if stop else ("fusion", "call", "while")
                for caller in self.callers[one.computation]:
                    if caller.opcode in left:
                        ahead.append((caller.operands[int(one.arguments)], index))
            elif one.opcode == "get-tuple-element":
                (index,) = re.findall(r"index=(\d+)", one.attributes)
                ahead.append((one.operands[0], int(index)))
            elif one.opcode in ("tuple", "while") and index is not None:
                whole = one.opcode == "while"
                ahead.append((one.operands[0 if whole else index], index if whole else None))
            elif one.opcode in ("fusion", "call"):
                (callee,) = one.callees("calls", "to_apply")
                ahead.append((self.root(callee), index))
            elif one.opcode.removesuffix("-start") not in stop and only.match(one.opcode):
                ahead += [(operand, None) for operand in one.operands]

    def forgets(self, select: _Instruction, body: dict[str, _Instruction], i: int) -> bool:
        """Returns whether each device chooses for itself between carry `i` of a loop and zero."""
        predicate, *branches = select.operands
        carry, zero = set(), set()
        for branch in branches:
            for one, element in self.behind(branch, _MOVES):
                if one.opcode == "parameter" and one.body is body and element == i:
                    carry.add(branch)
                elif re.fullmatch("constant -?0", f"{one.opcode} {one.arguments}"):
                    zero.add(branch)
        chosen = any(a in carry and b in zero for a, b in (branches, branches[::-1]))
        return chosen and any(x.opcode == "partition-id" for x, _ in self.behind(predicate))


def _group(attributes: str) -> int | None:
    """Returns how many devices a collective runs between, of which JAXs write three forms."""
    found = _GROUP.search(attributes)
    if not found:
        return None
    if found["ids"]:
        return found["ids"].count(",") + 1
    if found["size"]:
        return int(found["size"])
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found["mesh"]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found["axes"])  # whole, or a part of one
    return math.prod(int(part or sizes[name]) for name, part in axes)


def _read(array: _Instruction) -> int:
    """Returns the bytes that a fusion reads of an array: the slices, if it only slices that."""
    total = 0
    for user in array.users:
        if user.opcode == "bitcast":
            total += _read(user)
        elif user.opcode == "dynamic-slice":
            total += user.size
        elif user.opcode != "dynamic-update-slice" or user.operands[0] is not array:
            return array.size
    return total


def _written(root: _Instruction) -> int:
    """Returns the bytes that a fusion writes: of an update in place, the update."""
    if root.opcode == "tuple":
        return sum(map(_written, root.operands))
    if root.opcode == "bitcast":
        return _written(root.operands[0])
    return (root.operands[1] if root.opcode == "dynamic-update-slice" else root).size


def _size(shape: str, on_chip: bool = False) -> int:
    """Returns the bytes of an array, or of all in a tuple, from a text such as `f32[4,2]{1,0}`."""
    return sum(  # S(1) is the memory on a TPU's chip
        (1 if dtype == "pred" else math.ceil(int(bits or 0) / 8))
        * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, bits, dims, layout in _ARRAYS.findall(shape)
        if on_chip or "S(1)" not in layout
    )
