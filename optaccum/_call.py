"""The arguments of a call by their roles: parameters, rows, keys and a carry."""

from collections.abc import Callable, Iterable, Mapping
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaccum import _batch
from optaccum._batch import named_leaves
from optaccum._trees import ARRAYS
from optaccum._validate import check_argnums, check_names, check_takes, describe

ROWS, NAMES = "`batch_argnums`", "`batch_argnames`"
TRAINED, KEYS, CARRY = "`argnums`", "`rng_argnums`", "`carry_argnum`"


class Argnums(NamedTuple):
    """The checked options that give arguments their roles."""

    positions: dict[str, tuple[int, ...]]  # by option, counted from the end if negative
    names: tuple[str, ...] | None  # the keyword arguments to split; None if they were left out
    by_default: bool  # whether `batch_argnums` was left out
    layout: str | None  # `batch_layout`; None for a function without that option


def check_roles(
    batch_argnames: Any, has_aux: bool = False, layout: Any = None, **argnums: Any
) -> Argnums:
    """Returns the options that give roles, checked; None is the default of the batch."""
    if layout not in (None, "rows", "uneven", "stacked"):
        raise ValueError(f"`batch_layout` must be 'rows', 'uneven' or 'stacked', got {layout!r}")
    names = (batch_argnames,) if isinstance(batch_argnames, str) else batch_argnames
    if names is not None:
        names = check_names(NAMES, names, "a name or a tuple of names")
    options = {f"`{option}`": each for option, each in argnums.items()}
    by_default = options[ROWS] is None
    options[ROWS] = 1 if by_default else options[ROWS]
    if CARRY in options:
        options[CARRY] = () if options[CARRY] is None else (options[CARRY],)
    positions = {option: check_argnums(option, each) for option, each in options.items()}
    if positions.get(TRAINED) == ():
        raise ValueError(f"{TRAINED} must name at least one argument to differentiate, got ()")
    if positions[ROWS] == () and not names:
        raise ValueError(
            f"{ROWS} must name at least one argument to split, got () and no name in {NAMES}"
        )
    if positions.get(CARRY) and not has_aux:
        raise ValueError(
            f"{CARRY} needs `has_aux=True`: `fun` returns `(loss, (carry, aux))` with it"
        )
    return Argnums(positions, names, by_default, layout)


class Roles(NamedTuple):
    """The positions of arguments by role, none negative; a carry has one at most.

    It holds no array, so that a rule of differentiation may keep it.
    """

    trained: tuple[int, ...]
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    carry: tuple[int, ...]
    stacked: bool = False  # rows come as [n, m, ...]

    def split(self, args: Iterable[Any], n: int) -> list[Any]:
        """Returns arguments with their rows as `microbatch` wants them, [rows / n, n, ...]."""
        if self.stacked or n == 1:
            return list(args)
        return [_batch.split(x, n) if j in self.rows else x for j, x in enumerate(args)]

    def microbatch(self, args: Iterable[Any], i: Any, n: int) -> list[Any]:
        """Returns the arguments of microbatch i of n: its rows, its keys and the others whole."""
        args = list(args)
        if n == 1 and not self.stacked:
            return args
        for j in self.rows:
            args[j] = _batch.take(args[j], i, 0 if self.stacked else 1)
        for j in self.keys:
            args[j] = _batch.fold_in(args[j], i)
        return args


class Call:
    """The arguments of a call: `count` by position, then keyword arguments with these `names`."""

    def __init__(self, fun: Any, argnums: Argnums, args: tuple, kwargs: dict[str, Any]):
        self.args = [*args, *kwargs.values()]
        self.count, self.names, self.argnums = len(args), [*kwargs], argnums
        positions = _positions(argnums, self.count)
        lacks = f"but the call has the keyword arguments {self.names}"
        for name in argnums.names or ():
            if name in kwargs:
                positions[ROWS] += (self.count + self.names.index(name),)
            elif wrong := _absent(fun, name, args, lacks):
                raise ValueError(f"{NAMES} names {name!r}, {wrong}")
        if not positions[ROWS]:
            raise ValueError(f"{NAMES} names {argnums.names}, {lacks}")
        by_role = (positions.get(option, ()) for option in (TRAINED, ROWS, KEYS, CARRY))
        self.roles = Roles(*by_role, stacked=argnums.layout == "stacked")

    @property
    def nums_rows(self) -> list[int]:
        """The number of rows of each leaf of the batch; of microbatches, if they are stacked."""
        leaves = jax.tree.leaves([self.args[j] for j in self.roles.rows])
        return [x.shape[0] for x in leaves if getattr(x, "shape", ())]

    def title(self, j: int) -> str:
        """Returns what an error calls an argument."""
        return f"argument {j}" if j < self.count else f"argument `{self.names[j - self.count]}`"

    def titled(self, positions: Iterable[int]) -> dict[str, Any]:
        """Returns the arguments at some positions by their titles."""
        return {self.title(j): self.args[j] for j in positions}

    def others(self, positions: Iterable[int]) -> list[int]:
        """Returns all positions but these."""
        return [j for j in range(len(self.args)) if j not in positions]

    def by_position(self, fun: Callable[..., Any], option: str = "") -> Callable[..., Any]:
        """Returns a function of all arguments by position; `option` names one beside `fun`."""
        count, names = self.count, self.names
        if option:
            kwargs = dict(zip(names, self.args[count:], strict=True))
            check_takes(option, fun, self.args[:count], kwargs)

        @functools.wraps(fun)
        def call(*args):
            return fun(*args[:count], **dict(zip(names, args[count:], strict=True)))

        return call

    def check(self, n: int, remedy: str = _batch.PAD, devices: int = 1) -> None:
        """Raises unless all arguments fit their roles.

        `remedy` says how to make a batch that `n` divides on each of `devices`.
        """
        trained, rows, keys, carry, stacked = self.roles
        for name, leaf in named_leaves(self.titled(trained)):
            if not isinstance(leaf, ARRAYS):
                raise TypeError(
                    f"{name} is not an array but {describe(leaf)}, and {TRAINED} names it; take "
                    "the arrays out, `params, static = equinox.partition(model, "
                    "equinox.is_inexact_array)`, and let `fun` begin with "
                    "`model = equinox.combine(params, static)`"
                )
        if stacked:
            _batch.check_stack(self.titled(rows), n, devices)
        else:
            _batch.check_batch(self.titled(rows), n, remedy, self.argnums.layout, devices)
        if n > 1 or stacked:
            each = Roles((), (0,), (), (), stacked)
            _batch.check_objects(
                self.titled(rows), lambda x: each.microbatch(each.split([x], n), jnp.int32(0), n)[0]
            )
        others = self.titled(self.others((*rows, *keys, *carry)))
        _batch.check_keys(self.titled(keys), others, may_carry=CARRY in self.argnums.positions)
        check_no_other_rows(self, self.argnums)


def _positions(argnums: Argnums, count: int) -> dict[str, tuple[int, ...]]:
    """Returns the positions of each role, none negative, if there are `count` arguments."""
    positions = dict(argnums.positions)
    if argnums.by_default and argnums.names:
        taken = [j for option, several in positions.items() if option != ROWS for j in several]
        if count < 2 or 1 in [j % count for j in taken]:
            positions[ROWS] = ()  # the batch is given by keyword
    owners: dict[int, str] = {}
    for option, several in positions.items():
        for j in several:
            if not -count <= j < count:
                by_name = f"or name a keyword argument in {NAMES}"
                if argnums.by_default:
                    by_name += "; if `fun` closes over its batch, make the batch an argument"
                if option != ROWS:
                    by_name = "keyword arguments go to every microbatch whole"
                raise ValueError(
                    f"{option} names argument {j}, but the call has {count} positional arguments; "
                    f"pass it by position, {by_name}"
                )
            if j % count in owners:
                raise ValueError(
                    f"{option} names argument {j}, which {owners[j % count]} names already; an "
                    "argument has one role"
                )
            owners[j % count] = option
    return {option: tuple(j % count for j in several) for option, several in positions.items()}


def _absent(fun: Any, name: str, args: tuple, lacks: str) -> str | None:
    """Returns why a call lacks a keyword argument, or None if `fun` has a default for it.

    Many models have a mask that most calls leave out.
    """
    try:
        parameters: Mapping[str, Any] = inspect.signature(fun).parameters
    except (TypeError, ValueError):
        parameters = {}
    if name in [*parameters][: len(args)]:
        j = [*parameters].index(name)
        return f"which the call passes by position; name argument {j} in {ROWS}"
    if name in parameters and parameters[name].default is not inspect.Parameter.empty:
        return None
    return lacks


def check_no_other_rows(call: Call, argnums: Argnums) -> None:
    """Raises if an argument that nobody named has as many rows as the batch: it would broadcast.

    If the caller passed `batch_argnums`, all other positional arguments are meant to be whole, and
    if it passed `batch_argnames`, all other keyword arguments.
    """
    nums_rows, taken = call.nums_rows, {j for positions in call.roles[:4] for j in positions}
    if TRAINED not in argnums.positions:
        taken.add(0)  # the parameters, as far as anyone knows
    found: dict[int, tuple[str, int]] = {}
    for j in call.others(taken):
        if argnums.by_default if j < call.count else argnums.names is None:
            for name, leaf in named_leaves(call.titled([j])):
                if getattr(leaf, "shape", None) and leaf.shape[0] in nums_rows:
                    found.setdefault(j, (name, leaf.shape[0]))
    if not found:
        return
    j, (name, rows) = next(iter(found.items()))
    if j < call.count:
        whole = tuple(j for j in call.roles.rows if j < call.count)
        option, split = "batch_argnums", str((*whole, j))
        rest = str(whole[0] if len(whole) == 1 else whole)
        number = "both" if len(whole) == 1 else "it"
    else:
        names = [call.names[j - call.count] for j in found]
        option, split = "batch_argnames", "(" + ", ".join(f'"{x}"' for x in names) + ",)"
        rest, number = "()", "it" if len(names) == 1 else "them"
    raise ValueError(
        f"{name} has {rows} rows, as many as the batch in {call.title(call.roles.rows[0])}, but "
        f"`{option}` was left out, so that every microbatch would get all of them; pass "
        f"`{option}={split}` to split {number}, or `{option}={rest}` to give it to every "
        "microbatch whole"
    )
