"""What each primitive of JAX makes of the rows."""

from collections.abc import Callable
import math
from typing import Any

from optaccum.testing.explain.calls import CALLS
from optaccum.testing.explain.values import CONST, Value, merge

KEEP = {
    "convert_element_type", "broadcast_in_dim", "squeeze", "transpose", "expand_dims", "copy",
    "reduce_precision", "real", "imag", "neg", "name", "optimization_barrier",
    "sharding_constraint", "device_put", "pvary", "pcast", "pbroadcast", "reshard", "stop_gradient",
    "mesh_cast", "bitcast_convert_type",
}  # fmt: skip
ADD = {"add", "sub", "add_any"}
JOIN = {"concatenate", "stack"}
SUMS = {"reduce_sum", "dot_general", "scatter-add", "scatter_add", "reduce_window_sum", "psum",
        "psum2", "psum_invariant"}  # fmt: skip
ORDER = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "sort", "top_k",
         "approx_top_k"}  # fmt: skip
MATRICES = {"cholesky", "eigh", "eig", "svd", "qr", "lu", "triangular_solve", "fft",
            "householder_product", "geqrf", "schur", "tridiagonal_solve"}  # fmt: skip
RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"}
OPAQUE = {"pure_callback", "io_callback", "debug_callback", "ffi_call", "pallas_call",
          "custom_call", "tpu_custom_call"}  # fmt: skip

# Of numbers that the program holds, so that `x.shape[0] - 0` is the number of rows.
FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": max,
    "min": min,
    "neg": lambda a: -a,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "square": lambda a: a * a,
    "log": math.log,
    "exp": math.exp,
    "convert_element_type": lambda a: a,
    "copy": lambda a: a,
    "broadcast_in_dim": lambda a: a,
    "reshape": lambda a: a,
    "squeeze": lambda a: a,
}


def apply(walk: Any, one: Any, two: Any, values: list[Value]) -> list[Value]:
    """Returns the values that an equation computes."""
    name = one.primitive.name
    if name in CALLS:
        return CALLS[name](walk, one, two, values)
    return [_one(walk, one, two, values, i) for i in range(len(one.outvars))]


def _one(walk: Any, one: Any, two: Any, values: list[Value], i: int) -> Value:
    name, rules = one.primitive.name, walk.rules
    before = [_axes(x, y) for x, y in zip(one.invars, two.invars, strict=True)]
    after = _axes(one.outvars[i], two.outvars[i])
    data = [v for v in values if v.kind != "const"]
    merged = merge(values)
    if any(v.kind == "unknown" for v in values):
        return merged
    if name in RANDOM:
        if not after:
            return CONST
        number = walk.report("stochastic", "each row draws random numbers")
        return Value(because=frozenset({number}))
    if name == "iota":
        return Value(numbers=bool(after) and after == (one.params["dimension"],))
    pairs = [v.pair for v in values if v.pair is not None]
    if name in FOLD and len(pairs) == len(values):
        try:
            once, twice = (FOLD[name](*(pair[i] for pair in pairs)) for i in (0, 1))
            return walk.constant((once, twice))
        except (ArithmeticError, ValueError):
            return _constant(walk, name, values, before, after)
    if not data:
        return _constant(walk, name, values, before, after)
    if name in OPAQUE:
        return rules.flaw(values, "unknown", f"nothing is known of `{name}`", "unknown")
    if name in KEEP:
        return merged
    if name in ADD:
        return rules.add(values)
    if name in ("mul", "div"):
        return rules.multiply(*values, sign=1 if name == "mul" else -1)
    if name == "select_n":
        return _select(rules, values)
    rowwise = any(a for a, v in zip(before, values, strict=True) if v.kind in ("row", "mixed"))
    if name in SUMS or name.startswith(("reduce_", "arg")):
        return _reduce(walk, one, values, before, after)
    if name in ORDER or name in MATRICES:
        return _ordered(walk, one, values, before, after)
    if name == "conv_general_dilated":
        numbers = one.params["dimension_numbers"]
        if values[1].kind == "const" and before[0] == (numbers.lhs_spec[0],):
            return merged
        if values[0].kind == "row" and values[1].kind == "row" and not after:
            return rules.sum_rows(values)
        return rules.flaw(values, "unknown", "a convolution over rows", "unknown")
    if name in ("gather", "dynamic_slice", "slice", "split", "dynamic_update_slice", "pad",
                "scatter", "reshape", *JOIN):  # fmt: skip
        return _moved(walk, one, two, values, before, after)
    shapes = {x.aval.shape for x in one.invars if x.aval.shape}
    entrywise = all(_broadcasts(shape, one.outvars[i].aval.shape) for shape in shapes)
    if entrywise or (not rowwise and merged.kind == "total"):
        if name == "integer_pow" and one.params["y"] == 1:
            return merged
        active = merged.active and _has_gradient(one.outvars[i], name)
        return rules.curve(values, active)
    return rules.flaw(values, "unknown", f"nothing is known of `{name}`", "unknown")


def _constant(walk: Any, name: str, values: list[Value], before: list, after: tuple) -> Value:
    """Returns a value that depends on no data, but may on the number of rows."""
    rules, merged = walk.rules, merge(values)
    numbers = merged.numbers
    if not any(v.degree for v in values) and not (any(before) and not after):
        return merge(values, numbers=numbers and bool(after), pair=None)
    if name in KEEP | JOIN | {"reshape", "gather", "slice", "max", "min", "clamp"}:
        return merged
    if name in ("mul", "div"):
        sign = 1 if name == "mul" else -1
        return merge(values, degree=values[0].degree + sign * values[1].degree)
    if name in ADD:
        return rules.add(values)
    if name == "sqrt":
        return merge(values, degree=merged.degree / 2)
    if name in ("square", "integer_pow", "rsqrt"):
        return merge(values, degree=merged.degree * {"square": 2, "rsqrt": -0.5}.get(name, 1))
    if name == "reduce_sum" and not numbers:
        return merge(values, degree=merged.degree + 1)
    if name in SUMS and not merged.degree:
        return merge(values, degree=merged.degree + 1)
    if name in ("select_n", "pow") or name.startswith(("reduce_", "eq", "gt", "lt", "ge", "le")):
        return merge(values)
    return rules.odd(values) if any(v.degree for v in values) else merged


def _select(rules: Any, values: list[Value]) -> Value:
    """Returns a choice: a sum of the cases, as far as rows go."""
    predicate, *cases = values
    if predicate.kind == "row":
        return rules.curve(values)
    chosen = rules.add(cases) if any(v.kind != "const" for v in cases) else merge(cases)
    if predicate.kind in ("const", "total") and chosen.kind != "const":
        return merge([chosen], because=chosen.because | predicate.because)
    return merge([predicate, chosen])


def _reduce(walk: Any, one: Any, values: list[Value], before: list, after: tuple) -> Value:
    name, rules = one.primitive.name, walk.rules
    merged = merge(values)
    if name in ("psum", "psum2", "psum_invariant"):
        if merged.kind == "row" and any(before):
            return rules.flaw(values, "batch_statistic", "rows of different devices are added")
        return merged
    gone = any(b for b, v in zip(before, values, strict=True) if v.kind != "const") and not after
    if name == "dot_general":
        (left, right), _ = one.params["dimension_numbers"]
        mixed = after and (set(left) & set(before[0]) or set(right) & set(before[1]))
        if mixed and merged.kind == "row":
            return rules.flaw(values, "pairwise", "a matrix product runs over rows")
        if gone:
            if {v.kind for v in values} == {"row", "total"} and merged.active:
                return rules.multiply(*values)
            return rules.sum_rows(values)
        return rules.multiply(*values)
    if name.startswith("scatter"):
        if values[-1].kind != "const" and not after and any(before):
            return rules.sum_rows(values)
        return rules.add([values[0], values[-1]])
    if not gone:
        return merged if name == "reduce_sum" else rules.curve(values, _active(one, merged))
    if merged.kind == "mixed":
        return merged
    if name in ("reduce_sum", "reduce_window_sum"):
        return rules.sum_rows(values)
    return rules.pick(values, f"`{name}` runs over rows")


def _ordered(walk: Any, one: Any, values: list[Value], before: list, after: tuple) -> Value:
    name, rules, params = one.primitive.name, walk.rules, one.params
    merged = merge(values)
    ndim = len(one.outvars[0].aval.shape)
    if name in MATRICES:
        over = (
            {ndim - 2, ndim - 1}
            if name != "fft"
            else {*range(ndim - len(params["fft_lengths"]), ndim)}
        )
    else:
        over = params.get("axis", params.get("dimension", params.get("dimensions", ndim - 1)))
        over = {*over} if isinstance(over, tuple | list) else {over}
    rows = {axis for b, v in zip(before, values, strict=True) if v.kind == "row" for axis in b}
    if merged.kind == "row" and (over & rows or not after):
        return rules.flaw(values, "order", f"`{name}` runs over rows")
    return rules.curve(values, merged.active) if merged.kind == "total" else merged


def _moved(walk: Any, one: Any, two: Any, values: list[Value], before: list, after: tuple) -> Value:
    """Returns what comes of entries that are taken, put together or reshaped."""
    name, rules, merged = one.primitive.name, walk.rules, merge(values)
    source, shape = one.invars[0].aval.shape, one.outvars[0].aval.shape
    if merged.kind != "row":
        return merged
    if name == "reshape":
        if after and shape[after[0]] < walk.rows:
            return rules.flaw(values, "order", "rows are put into groups")
        return merged
    if name in JOIN:
        return merged
    taken = values[0].kind != "const" and before[0]
    if name == "gather" and taken:
        batching = one.params["dimension_numbers"].operand_batching_dims
        sizes = one.params["slice_sizes"]
        whole = all(axis in batching or sizes[axis] == source[axis] for axis in before[0])
        if whole or values[1].numbers:
            return merged
        return rules.flaw(values, "order", "rows are taken by their position")
    if name in ("scatter", "dynamic_update_slice"):
        return merged if after else rules.flaw(values, "order", "rows overwrite each other")
    if name in ("slice", "dynamic_slice", "split", "pad") and taken:
        sizes = [x.aval.shape for x in one.outvars]
        if not after or any(s[axis] != source[axis] for s in sizes for axis in before[0]):
            half = after and all(
                2 * s[a] == source[a] == 2 * walk.rows for s in sizes for a in after
            )
            if not half:  # the halves of two batches put together are rows again
                return rules.flaw(values, "order", "some rows are taken by their position")
    return merged


def _axes(a: Any, b: Any) -> tuple[int, ...]:
    if a.aval.shape == b.aval.shape:
        return ()
    return tuple(
        i for i, (x, y) in enumerate(zip(a.aval.shape, b.aval.shape, strict=True)) if x != y
    )


def _broadcasts(shape: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    same = len(shape) == len(wide)
    return same and all(a in (1, b) for a, b in zip(shape, wide, strict=True))


def _active(one: Any, merged: Value) -> bool:
    return merged.active and _has_gradient(one.outvars[0], one.primitive.name)


def _has_gradient(variable: Any, name: str) -> bool:
    return name not in ("sign", "floor", "ceil", "round", "is_finite", "nextafter") and (
        variable.aval.dtype.kind not in "biu"
    )
