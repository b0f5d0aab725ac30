"""Roles: which arguments of a call are rows, keys, parameters or a carry."""

from collections.abc import Callable, Iterable
import inspect
from typing import Any, NamedTuple

import jax
import numpy as np

from optaccum import _batch
from optaccum._objects import check_slices
from optaccum._rows import PAD, check_batch, check_keys, named_leaves
from optaccum._validate import check_argnums, check_names, describe

ROWS, NAMES = "`batch_argnums`", "`batch_argnames`"
TRAINED, KEYS, CARRY = "`argnums`", "`rng_argnums`", "`carry_argnum`"


class Roles(NamedTuple):
    """What the options say of the roles of arguments.

    Attributes:
        argnums: {option: positions}.
        names: the keyword arguments to split; None where `batch_argnames` was left out.
        by_default: whether `batch_argnums` was left out.
    """

    argnums: dict[str, tuple[int, ...]]
    names: tuple[str, ...] | None
    by_default: bool


def check_roles(given: dict[str, Any], batch_argnames: Any, has_aux: bool = False) -> Roles:
    """Returns the roles that options give to arguments; None is the default of the batch."""
    names = (batch_argnames,) if isinstance(batch_argnames, str) else batch_argnames
    if names is not None:
        names = check_names(NAMES, names, "a name or a tuple of names")
    by_default = given[ROWS] is None
    given = given | {ROWS: 1} if by_default else given
    argnums = {option: check_argnums(option, each) for option, each in given.items()}
    if argnums.get(TRAINED) == ():
        raise ValueError(f"{TRAINED} must name at least one argument to differentiate, got ()")
    if argnums[ROWS] == () and not names:
        raise ValueError(
            f"{ROWS} must name at least one argument to split, got () and no name in {NAMES}"
        )
    if argnums.get(CARRY) and not has_aux:
        raise ValueError(
            f"{CARRY} needs `has_aux=True`: `fun` returns `(loss, (carry, aux))` with it"
        )
    return Roles(argnums, names, by_default)


class Call:
    """The arguments of a call by position, those given by keyword behind the others.

    Attributes:
        args: all arguments.
        count: how many of them are given by position.
        names: the names of the others.
        roles: {option: positions}, none negative; the batch has its keyword arguments, too.
    """

    def __init__(self, fun: Any, roles: Roles, args: tuple, kwargs: dict[str, Any]):
        self.args = [*args, *kwargs.values()]
        self.count, self.names = len(args), [*kwargs]
        self.roles = _positions(roles, self.count)
        for name in roles.names or ():
            if name in kwargs:
                self.roles[ROWS] += (self.count + self.names.index(name),)
            elif (place := _place(fun, name, args)) is not None:
                raise ValueError(f"{NAMES} names {name!r}, {place or _keywords(kwargs)}")
        if not self.roles[ROWS]:
            raise ValueError(f"{NAMES} names {roles.names}, {_keywords(kwargs)}")

    def title(self, j: int) -> str:
        """Returns what an error calls an argument."""
        return f"argument {j}" if j < self.count else f"argument `{self.names[j - self.count]}`"

    def by_position(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function of all arguments by position."""
        return _batch.by_position(fun, self.count, self.names)

    def some(self, positions: Iterable[int]) -> dict[str, Any]:
        """Returns the arguments at some positions by their titles."""
        return {self.title(j): self.args[j] for j in positions}

    def others(self, positions: Iterable[int]) -> list[int]:
        """Returns all positions but some."""
        return [j for j in range(len(self.args)) if j not in positions]


def _positions(roles: Roles, count: int) -> dict[str, tuple[int, ...]]:
    """Returns the argnums of each role, none negative, if there are `count` arguments."""
    argnums = dict(roles.argnums)
    if roles.by_default and roles.names:
        taken = [j for option, several in argnums.items() if option != ROWS for j in several]
        if count < 2 or 1 in [j % count for j in taken]:
            argnums[ROWS] = ()  # the batch is given by keyword
    owners: dict[int, str] = {}
    for option, several in argnums.items():
        for j in several:
            if not -count <= j < count:
                by_name = f"or name a keyword argument in {NAMES}"
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
    return {option: tuple(j % count for j in several) for option, several in argnums.items()}


def _place(fun: Any, name: str, args: tuple) -> str | None:
    """Returns where a call has an argument that is not among its keywords: "" for nowhere.

    None if it is left out and `fun` has a default for it, as models have for a mask.
    """
    try:
        parameters = inspect.signature(fun).parameters
    except (TypeError, ValueError):
        return ""
    if name not in parameters:
        return ""
    j = [*parameters].index(name)
    if j < len(args):
        return f"which the call passes by position; name argument {j} in {ROWS}"
    return "" if parameters[name].default is inspect.Parameter.empty else None


def _keywords(kwargs: dict[str, Any]) -> str:
    return f"but the call has the keyword arguments {[*kwargs]}"


def check_call(
    fun: Any, roles: Roles, args: tuple, kwargs: dict[str, Any], n: int, remedy: str = PAD
) -> Call:
    """Returns a call whose arguments fit their roles.

    `remedy` says how a batch can be made one that `n` divides.
    """
    call = Call(fun, roles, args, kwargs)
    rows, keys = call.roles[ROWS], call.roles[KEYS]
    for name, leaf in named_leaves(call.some(call.roles.get(TRAINED, ()))):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise TypeError(
                f"{name} is no array but {describe(leaf)}, and {TRAINED} names it; take the arrays "
                "out, `params, static = equinox.partition(model, equinox.is_inexact_array)`, and "
                "let `fun` begin with `model = equinox.combine(params, static)`"
            )
    check_batch(call.some(rows), n, remedy)
    check_slices(call.some(rows), n)
    others = call.others((*rows, *keys, *call.roles.get(CARRY, ())))
    check_keys(call.some(keys), call.some(others), carries=CARRY in call.roles)
    check_no_other_rows(call, roles)
    return call


def check_no_other_rows(call: Call, roles: Roles) -> None:
    """Raises where an argument that nobody named has as many rows as the batch: it would broadcast.

    To name the batch says of the other arguments that they are whole: `batch_argnums` of those by
    position, `batch_argnames` of those by keyword.
    """
    of_batch = call.roles[ROWS]
    rows = jax.tree.leaves(call.some(of_batch))[0].shape[0]
    taken = {j for several in call.roles.values() for j in several}
    if TRAINED not in call.roles:
        taken.add(0)  # the parameters, as far as anyone knows
    found: dict[int, str] = {}
    for j in call.others(taken):
        for name, leaf in named_leaves(call.some([j])):
            if getattr(leaf, "shape", None) and leaf.shape[0] == rows:
                found.setdefault(j, name)
    whole = tuple(j for j in of_batch if j < call.count)
    for j, name in found.items():
        if j < call.count and roles.by_default:
            option, split = ROWS, (*whole, j)
            rest = str(whole[0] if len(whole) == 1 else whole)
            number = "both" if len(split) == 2 else "it"
        elif j >= call.count and roles.names is None:
            names = [call.names[j - call.count] for j in found if j >= call.count]
            option, split, rest = NAMES, "(" + ", ".join(f'"{x}"' for x in names) + ",)", "()"
            number = "it" if len(names) == 1 else "them"
        else:
            continue
        option = option.strip("`")
        raise ValueError(
            f"{name} has {rows} rows, as many as the batch in {call.title(of_batch[0])}, but "
            f"`{option}` was left out, so that every microbatch would get all of them; pass "
            f"`{option}={split}` to split {number}, or `{option}={rest}` to give it to every "
            "microbatch whole"
        )
