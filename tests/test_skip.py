"""What is not finite is found by a sum: the same verdict as Optax's, for every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaccum import skip_not_finite

DTYPES = ["float32", "bfloat16", "float16", "float8_e5m2", "complex64", "float64", "complex128"]


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_verdict_is_that_of_optax(dtype, jitted, x64):
    largest = jnp.finfo(dtype).max
    judge = jax.jit(skip_not_finite) if jitted else skip_not_finite
    for bad in (0.0, -1.0, largest, -largest, jnp.nan, jnp.inf, -jnp.inf):
        leaf = jnp.full((3, 2), largest, dtype).at[1, 1].set(jnp.asarray(bad, dtype))
        grads = {"a": jnp.ones(4), "b": leaf, "none": None}
        expected, _ = optax.skip_not_finite(grads, jnp.int32(0), None)
        skip, report = judge(grads, jnp.int32(0), None)
        assert bool(skip) == bool(expected) == (not np.isfinite(bad)), bad
        assert (skip.dtype, skip.shape, bool(report["should_skip"])) == (jnp.bool_, (), bool(skip))


def test_an_imaginary_part_and_no_gradients():
    leaf = jnp.array([1.0 + 1j * np.nan, 1.0])
    assert bool(skip_not_finite(leaf, 0, None)[0])
    assert not bool(skip_not_finite({"a": None}, 0, None)[0])
