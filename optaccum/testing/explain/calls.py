"""Programs inside a program: jit, remat, custom derivatives, conditionals, loops, devices."""

import dataclasses
from typing import Any

from optaccum.testing.explain.values import CONST, Value, merge

ROUNDS = 6  # of a loop, until what it carries stays as it is


def _call(walk: Any, one: Any, two: Any, values: list[Value]) -> list[Value]:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in one.params:
            return walk.nested(one.params[name], two.params[name], values)
    flaw = walk.rules.flaw(values, "unknown", f"nothing is known of `{one.primitive}`", "unknown")
    return [flaw] * len(one.outvars)


def _cond(walk: Any, one: Any, two: Any, values: list[Value]) -> list[Value]:
    index, *operands = values
    pairs = zip(one.params["branches"], two.params["branches"], strict=True)
    results = [walk.nested(a, b, operands) for a, b in pairs]
    joined = [_join(list(each)) for each in zip(*results, strict=True)]
    if index.kind in ("const", "row"):
        return joined
    return [
        walk.rules.flaw([index, v], "nonlinear", "a sum over rows decides a branch")
        if v.active
        else v
        for v in joined
    ]


def _scan(walk: Any, one: Any, two: Any, values: list[Value]) -> list[Value]:
    params = one.params
    body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
    # What is scanned over has one axis less in the body. JAX names these numbers in several ways.
    scanned = sum(_loses_axis(x, y) for x, y in zip(one.invars, body.invars, strict=True))
    stacked = sum(_loses_axis(x, y) for x, y in zip(one.outvars, body.outvars, strict=True))
    carried = len(one.outvars) - stacked
    consts = len(one.invars) - scanned - carried
    fixed, carry, xs = (
        values[:consts],
        values[consts : consts + carried],
        values[consts + carried :],
    )
    a, b = params["jaxpr"], two.params["jaxpr"]
    by_row = params["length"] != two.params["length"]
    for _ in range(ROUNDS):
        results = walk.nested(a, b, [*fixed, *carry, *xs])
        new = results[:carried]
        if by_row:
            new = [_over_rows(walk, old, v) for old, v in zip(carry, new, strict=True)]
        joined = [_join([old, v]) for old, v in zip(carry, new, strict=True)]
        if by_row:
            # What a loop leaves of each row is made of what it has carried so far.
            results = walk.nested(a, b, [*fixed, *joined, *xs])
            return [*joined, *results[carried:]]
        if joined == carry:
            break
        carry = joined
    return [*carry, *results[carried:]]


def _loses_axis(outer: Any, inner: Any) -> bool:
    return len(outer.aval.shape) > len(inner.aval.shape)


def _over_rows(walk: Any, old: Value, new: Value) -> Value:
    """Returns what a loop over rows carries."""
    if new.kind == "const":
        return new
    if old.kind in ("const", "total") and new.kind == "row":
        return walk.rules.flaw([old, new], "unknown", "a loop over rows carries them", "unknown")
    return new


def _while(walk: Any, one: Any, two: Any, values: list[Value]) -> list[Value]:
    params = one.params
    first, second = params["cond_nconsts"], params["body_nconsts"]
    fixed, carry = values[first : first + second], values[first + second :]
    for _ in range(ROUNDS):
        new = walk.nested(params["body_jaxpr"], two.params["body_jaxpr"], [*fixed, *carry])
        joined = [_join([old, v]) for old, v in zip(carry, new, strict=True)]
        if joined == carry:
            break
        carry = joined
    (goes_on,) = walk.nested(
        params["cond_jaxpr"], two.params["cond_jaxpr"], [*values[:first], *carry]
    )
    if goes_on.kind in ("total", "mixed"):
        carry = [
            walk.rules.flaw([goes_on, v], "unknown", "rows decide how long a loop runs", "unknown")
            if v.kind != "const"
            else v
            for v in carry
        ]
    return carry


def _join(values: list[Value]) -> Value:
    """Returns what is known of a value that is one of several."""
    merged = merge(values)
    same = len({(v.kind, v.degree) for v in values if v.kind != "const"}) < 2
    if not same and merged.kind in ("row", "total"):
        return dataclasses.replace(merged, degree=max(v.degree for v in values))
    return merged


def _gather_devices(walk: Any, one: Any, two: Any, values: list[Value]) -> list[Value]:
    if values[0].kind != "row":
        return values
    return [walk.rules.flaw(values, "pairwise", "devices exchange their rows")]


def _index(walk: Any, one: Any, two: Any, values: list[Value]) -> list[Value]:
    return [CONST]


CALLS = {
    **dict.fromkeys(
        (
            "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
            "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin",
            "shard_map", "xla_call", "run_state",
        ),
        _call,
    ),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    **dict.fromkeys(
        ("all_gather", "all_to_all", "ppermute", "all_gather_invariant"), _gather_devices
    ),
    "axis_index": _index,
}  # fmt: skip
