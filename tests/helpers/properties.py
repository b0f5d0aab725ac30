"""What random tests share: settings of hypothesis, numbers to draw, and bounds on rounding."""

import hypothesis
import jax.numpy as jnp
import numpy as np

# Derandomised: the same examples on every run, so that a failure is a change of the code. Not
# shrunk: every attempt compiles several programs.
STABLE = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
DTYPES = [jnp.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64)]
UNIT_ROUNDOFF = float(np.finfo(np.float32).eps) / 2


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns multiples of 2^-5 up to 2, exact in every dtype: rounding begins in the library."""
    x = rng.integers(-64, 65, shape) / 32
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.integers(-64, 65, shape) / 32
    return np.asarray(x).astype(dtype)


def wide(x) -> np.ndarray:
    """Returns `x` in double precision."""
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def mean_bound(dtype, exact: np.ndarray, scale: np.ndarray, terms: int) -> np.ndarray:
    """Returns how far a weighted mean of `terms` gradients may be from the exact one.

    Each of n terms is rounded once when it is weighted (w g; twice for complex g, whose two
    products are summed), then at most n times in the running sum, so the sum is off by at most
    (n + 2) u sum |w g|, u = 2^-24. The sum of weights is off by n u, its reciprocal and the
    product with it by u each: (2 n + 4) u to first order, and 10% for all higher orders. The
    cast to the gradient's dtype rounds once more, to u_d |G|, or by half of float16's smallest
    number where that is subnormal.

    Args:
        dtype: dtype of the gradient.
        exact: the mean in double precision.
        scale: sum_i |w_i g_i| / sum_i w_i.
        terms: n, the microbatches.
    """
    info = jnp.finfo(dtype)
    bound = 1.1 * (2 * terms + 4) * UNIT_ROUNDOFF * scale
    # The same again on top of the rounding to `dtype`, which sees the inexact number.
    return bound + float(info.eps) / 2 * (np.abs(exact) + bound) + float(info.smallest_subnormal)
