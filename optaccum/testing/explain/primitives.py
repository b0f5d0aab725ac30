"""What each primitive of JAX makes of the rows."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from optaccum.testing.explain import values as rules
from optaccum.testing.explain.values import CONST, Mark, Value

KEEP = {
    "convert_element_type", "broadcast_in_dim", "squeeze", "transpose", "expand_dims", "copy",
    "reduce_precision", "real", "imag", "neg", "name", "optimization_barrier",
    "sharding_constraint", "device_put", "pvary", "pcast", "pbroadcast", "reshard", "stop_gradient",
    "mesh_cast", "bitcast_convert_type", "concatenate", "stack",
}  # fmt: skip
ORDER = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "sort", "top_k",
         "cholesky", "eigh", "eig", "svd", "qr", "lu", "triangular_solve", "fft",
         "householder_product", "geqrf", "schur", "tridiagonal_solve"}  # fmt: skip
LINEAR = {"reduce_sum", "reduce_window_sum", "cumsum", "rev", "fft"}
RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"}
OPAQUE = {"pure_callback", "io_callback", "debug_callback", "ffi_call", "pallas_call",
          "custom_call", "tpu_custom_call"}  # fmt: skip
FLAT = {"sign", "floor", "ceil", "round", "is_finite", "nextafter"}  # without a gradient

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
    "reshape": lambda a: a,
}


@dataclasses.dataclass(frozen=True)
class Equation:
    """One result of an equation in the two programs, and the values that go in.

    Attributes:
        once: the equation for the rows as they are.
        twice: the equation for twice as many.
        values: what is known of its arguments.
        result: which result is meant.
        rows: how many rows there are.
    """

    once: Any
    twice: Any
    values: list[Value]
    result: int
    rows: int

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.once.primitive.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.once.outvars[self.result].aval.shape

    @property
    def before(self) -> list[tuple[int, ...]]:
        """The axes of rows of each argument."""
        return [_axes(x, y) for x, y in zip(self.once.invars, self.twice.invars, strict=True)]

    @property
    def after(self) -> tuple[int, ...]:
        """The axes of rows of the result."""
        return _axes(self.once.outvars[self.result], self.twice.outvars[self.result])

    def unknown(self, what: str) -> Value:
        """Returns a value of which nothing is known."""
        return rules.flaw(self.values, "unknown", what)

    def curve(self) -> Value:
        """Returns a nonlinear function of the arguments."""
        real = jnp.issubdtype(self.once.outvars[self.result].aval.dtype, jnp.inexact)
        return rules.curve(self.values, real and self.name not in FLAT)


def apply(equation: Equation) -> Value:
    """Returns what is known of the result of an equation."""
    name, values = equation.name, equation.values
    kinds = {v.kind for v in values}
    if name in RANDOM and equation.after:
        return rules.mark(CONST, Mark("stochastic", "each row draws random numbers"))
    if name == "iota":
        return Value(positions=equation.after == (equation.once.params["dimension"],))
    if "mixed" in kinds or name in KEEP:
        return rules.merge(values)
    folded = _fold(equation)
    if folded is not None:
        return folded
    if name in OPAQUE and kinds != {"const"}:
        return equation.unknown(f"nothing is known of `{name}`")
    if name in RULES:
        return RULES[name](equation)
    if name in ORDER or name.startswith(("reduce_", "arg")):
        return _along(equation)
    shapes = [x.aval.shape for x in equation.once.invars if x.aval.shape]
    if "row" not in kinds or all(_broadcasts(shape, equation.shape) for shape in shapes):
        return equation.curve()
    return equation.unknown(f"nothing is known of `{name}`")


def _fold(equation: Equation) -> Value | None:
    numbers = [v.number for v in equation.values if v.number is not None]
    if equation.name not in FOLD or len(numbers) < len(equation.values):
        return None
    try:
        return rules.number(*(FOLD[equation.name](*each) for each in zip(*numbers, strict=True)))
    except (ArithmeticError, ValueError):
        return None


def _along(equation: Equation) -> Value:
    """Returns what an equation makes that works along some axes: a reduction, an order."""
    name, params = equation.name, equation.once.params
    axes = [params[key] for key in ("axes", "axis", "dimension", "dimensions") if key in params]
    if "window_dimensions" in params:
        over = {i for i, size in enumerate(params["window_dimensions"]) if size > 1}
    elif axes:
        over = {*axes[0]} if isinstance(axes[0], tuple | list) else {axes[0]}
    else:  # matrices, but for two primitives
        last = len(params["fft_lengths"]) if name == "fft" else 1 if name == "top_k" else 2
        ndim = len(equation.once.invars[0].aval.shape)
        over = {*range(ndim - last, ndim)}
    merged = rules.merge(equation.values)
    if not any(over & {*axes} for axes in equation.before):
        return merged if name in LINEAR else equation.curve()
    if name == "reduce_sum":
        return rules.sum_rows(merged)
    if merged.kind == "const":
        return equation.curve()
    if name in ORDER or "window" in name:
        return rules.flaw(equation.values, "order", f"`{name}` runs over rows")
    if merged.active:
        return rules.flaw(equation.values, "nonlinear", f"`{name}` runs over rows")
    return rules.merge(equation.values, "total", degree=0.0)


def _dot(equation: Equation) -> Value:
    contracted = equation.once.params["dimension_numbers"][0]
    product = rules.multiply(*equation.values)
    if not any({*c} & {*b} for c, b in zip(contracted, equation.before, strict=True)):
        return product
    if equation.after and product.kind == "row":
        return rules.flaw(equation.values, "pairwise", "a matrix product runs over rows")
    return rules.sum_rows(product)


def _scatter(equation: Equation) -> Value:
    merged = rules.merge(equation.values)
    if not any(equation.before) or equation.after or merged.kind == "const":
        return rules.add([equation.values[0], equation.values[-1]])
    if equation.name == "scatter":
        return rules.flaw(equation.values, "order", "rows overwrite each other")
    return rules.sum_rows(merged)


def _gather(equation: Equation) -> Value:
    source, positions = equation.values[:2]
    axes, params = equation.before[0], equation.once.params
    whole = equation.once.invars[0].aval.shape
    kept = all(
        axis in params["dimension_numbers"].operand_batching_dims
        or params["slice_sizes"][axis] == whole[axis]
        for axis in axes
    )
    if source.kind != "row" or kept or positions.positions:
        return rules.merge(equation.values)
    return rules.flaw(equation.values, "order", "rows are taken by their position")


def _slice(equation: Equation) -> Value:
    axes, source = equation.before[0], equation.once.invars[0].aval.shape
    # The halves of two batches put together are rows again.
    kept = equation.after and all(equation.shape[i] in (source[i], equation.rows) for i in axes)
    if equation.values[0].kind != "row" or not axes or kept:
        return rules.merge(equation.values)
    return rules.flaw(equation.values, "order", "some rows are taken by their position")


def _reshape(equation: Equation) -> Value:
    after = equation.after
    if equation.values[0].kind == "row" and after and equation.shape[after[0]] < equation.rows:
        return rules.flaw(equation.values, "order", "rows are put into groups")
    return rules.merge(equation.values)


def _convolution(equation: Equation) -> Value:
    batch = equation.once.params["dimension_numbers"].lhs_spec[0]
    if equation.values[1].kind == "const" and equation.before[0] in ((), (batch,)):
        return rules.merge(equation.values)
    return equation.unknown("a convolution over rows")


def _of_devices(equation: Equation) -> Value:
    merged = rules.merge(equation.values)
    if merged.kind != "row":
        return merged
    if equation.name.startswith("psum"):
        detail = "rows of different devices are added"
        flawed = rules.flaw(equation.values, "batch_statistic", detail)
        return flawed if any(equation.before) else merged
    return rules.flaw(equation.values, "pairwise", "devices exchange their rows")


RULES: dict[str, Callable[[Equation], Value]] = {
    **dict.fromkeys(("add", "sub", "add_any"), lambda e: rules.add(e.values)),
    "mul": lambda e: rules.multiply(*e.values),
    "div": lambda e: rules.multiply(*e.values, sign=-1),
    "select_n": lambda e: rules.select(e.values[0], e.values[1:]),
    "dot_general": _dot,
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add", "dynamic_update_slice"), _scatter),
    "gather": _gather,
    **dict.fromkeys(("slice", "dynamic_slice", "split", "pad"), _slice),
    "reshape": _reshape,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(("psum", "psum2", "psum_invariant", "all_gather", "all_to_all", "ppermute",
                     "all_gather_invariant"), _of_devices),
    "axis_index": lambda e: CONST,
}  # fmt: skip


def _axes(a: Any, b: Any) -> tuple[int, ...]:
    pairs = zip(a.aval.shape, b.aval.shape, strict=True)
    return tuple(i for i, (x, y) in enumerate(pairs) if x != y)


def _broadcasts(shape: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    same = len(shape) == len(wide)
    return same and all(a in (1, b) for a, b in zip(shape, wide, strict=True))
