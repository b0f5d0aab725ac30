"""What each primitive of JAX makes of the rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from optaccum.testing.explain import values as rules
from optaccum.testing.explain.values import Value

KEEP = {
    "convert_element_type", "broadcast_in_dim", "squeeze", "transpose", "copy",
    "reduce_precision", "real", "imag", "neg", "name", "optimization_barrier",
    "sharding_constraint", "device_put", "pvary", "pcast", "pbroadcast", "reshard", "stop_gradient",
    "mesh_cast", "bitcast_convert_type", "concatenate", "stack",
}  # fmt: skip
ORDER = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "sort", "top_k"}
LINEAR = {"reduce_sum", "cumsum", "rev"}
MATRICES = {"cholesky", "eigh", "eig", "svd", "qr", "lu", "triangular_solve", "fft"}
DEVICES = {"psum", "psum_invariant", "all_gather", "all_to_all", "ppermute"}
RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"}
# Of numbers that the program holds, so that `x.shape[0] - 0` is the number of rows.
FOLD = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum,
    "min": np.minimum, "sqrt": np.sqrt, "log": np.log, "exp": np.exp,
}  # fmt: skip


class Equation(NamedTuple):
    """One result of an equation, and the values that go in."""

    name: str  # of the primitive
    params: dict[str, Any]
    values: list[Value]  # of the arguments
    shapes: list[tuple[int, ...]]  # of the arguments
    before: list[tuple[int, ...]]  # the axes of rows of each argument
    shape: tuple[int, ...]  # of the result
    after: tuple[int, ...]  # the axes of rows of the result
    rows: int  # how many rows there are


def apply(e: Equation) -> Value:
    """Returns what is known of the result of an equation."""
    kinds = {v.kind for v in e.values}
    if e.name in RANDOM and e.after:
        return rules.found(Value(), "stochastic", "each row draws random numbers")
    if not e.values:
        return Value(positions=e.name == "iota" and e.after == (e.params["dimension"],))
    if "mixed" in kinds or e.name in KEEP:
        return rules.merge(e.values)
    if e.name in FOLD and all(v.number for v in e.values):
        with np.errstate(all="ignore"):
            numbers = FOLD[e.name](*(np.array(v.number) for v in e.values))
            return rules.of_number(*map(float, numbers))
    if e.name in RULES:
        return RULES[e.name](e)
    if e.name in ORDER or e.name.startswith(("reduce_", "arg")):
        return _along(e)
    by_entry = "row" not in kinds or all(_broadcasts(x, e.shape) for x in e.shapes)
    opaque = "call" in e.name or e.name == "while"
    return rules.curve(e.values) if by_entry and not opaque else _unknown(e)


def _broadcasts(shape: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    pairs = zip(shape, wide, strict=False)
    return len(shape) in (0, len(wide)) and all(x in (1, y) for x, y in pairs)


def _unknown(e: Equation) -> Value:
    if all(v.kind == "const" for v in e.values):
        return rules.curve(e.values)
    return rules.flaw(e.values, "unknown", f"nothing is known of `{e.name}`")


def _along(e: Equation) -> Value:
    """Returns what an equation makes that works along some axes: a reduction, an order."""
    names = "axes", "axis", "dimension", "dimensions"
    along = next((e.params[name] for name in names if name in e.params), len(e.shapes[0]) - 1)
    merged = rules.merge(e.values)
    if not any({*np.atleast_1d(along)} & {*axes} for axes in e.before):
        return merged if e.name in LINEAR else rules.curve(e.values)
    if e.name == "reduce_sum":
        return rules.sum_rows(merged)
    if merged.kind == "const":
        return rules.curve(e.values)
    if e.name in ORDER:
        return rules.flaw(e.values, "order", f"`{e.name}` runs over rows")
    if merged.active:
        return rules.flaw(e.values, "nonlinear", f"`{e.name}` runs over rows")
    return rules.merge(e.values, "total", degree=0.0)


def _dot(e: Equation) -> Value:
    contracted = e.params["dimension_numbers"][0]
    product = rules.multiply(e.values)
    if not any({*c} & {*b} for c, b in zip(contracted, e.before, strict=True)):
        return product
    if e.after and product.kind == "row":
        return rules.flaw(e.values, "pairwise", "a matrix product runs over rows")
    return rules.sum_rows(product)


def _gather(e: Equation) -> Value:
    whole = e.params["dimension_numbers"].operand_batching_dims
    sizes, shape = e.params["slice_sizes"], e.shapes[0]
    same = all(axis in whole or sizes[axis] == shape[axis] for axis in e.before[0])
    if same or e.values[0].kind != "row" or e.values[1].positions:
        return rules.merge(e.values)
    return rules.flaw(e.values, "order", "rows are taken by their position")


def _slice(e: Equation) -> Value:
    # The halves of two batches put together are rows again.
    same = e.after and all(e.shape[i] in (e.shapes[0][i], e.rows) for i in e.before[0])
    if same or e.values[0].kind != "row" or not e.before[0]:
        return rules.merge(e.values)
    return rules.flaw(e.values, "order", "some rows are taken by their position")


def _reshape(e: Equation) -> Value:
    if e.values[0].kind == "row" and e.after and e.shape[e.after[0]] < e.rows:
        return rules.flaw(e.values, "order", "rows are put into groups")
    return e.values[0]


def _scatter(e: Equation) -> Value:
    merged = rules.merge(e.values)
    if e.after or not any(e.before):
        return merged
    return rules.sum_rows(merged) if e.name == "scatter-add" else _unknown(e)


def _of_matrices(e: Equation) -> Value:
    pairs = zip(e.before, e.shapes, strict=True)
    over_rows = any(axis >= len(shape) - 2 for axes, shape in pairs for axis in axes)
    return _unknown(e) if over_rows else rules.curve(e.values)


def _convolution(e: Equation) -> Value:
    rows = e.before[0] in ((), (e.params["dimension_numbers"].lhs_spec[0],))
    return rules.merge(e.values) if rows and e.values[1].kind == "const" else _unknown(e)


def _of_devices(e: Equation) -> Value:
    if e.values[0].kind != "row" or (e.name.startswith("psum") and not any(e.before)):
        return e.values[0]
    return rules.flaw(e.values, "pairwise", "devices exchange their rows")


RULES: dict[str, Callable[[Equation], Value]] = {
    **dict.fromkeys(("add", "sub", "add_any"), lambda e: rules.add(e.values)),
    "mul": lambda e: rules.multiply(e.values),
    "div": lambda e: rules.multiply(e.values, sign=-1),
    "select_n": lambda e: rules.select(e.values[0], e.values[1:]),
    "dot_general": _dot,
    "gather": _gather,
    **dict.fromkeys(("slice", "dynamic_slice", "split", "pad"), _slice),
    "reshape": _reshape,
    **dict.fromkeys(("scatter", "scatter-add", "dynamic_update_slice"), _scatter),
    **dict.fromkeys(MATRICES, _of_matrices),
    "conv_general_dilated": _convolution,
    **dict.fromkeys(DEVICES, _of_devices),
}
