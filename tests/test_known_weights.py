"""A positive weight that is a number when traced is the same for all microbatches: it drops out."""

from helpers.meshes import make_mesh
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest

import optaccum

W = jnp.array([1.0, -0.5, 0.3])
X = jax.random.normal(jax.random.key(0), (8, 3))
every_n = pytest.mark.parametrize("n", [1, 4])
KNOWN = {
    "python": lambda w, x: 3.0,
    "numpy": lambda w, x: np.float32(0.5),
    "rows": lambda w, x: len(x),
    "huge": lambda w, x: 2**64,
}


def _loss(w, x):
    return jnp.mean(jnp.tanh(x @ w))


def _program(n, weight_fn):
    step = optaccum.value_and_grad(_loss, num_microbatches=n, weight_fn=weight_fn)
    return jax.jit(step).lower(W, X).as_text()


@every_n
@pytest.mark.parametrize("weight_fn", KNOWN.values(), ids=KNOWN)
def test_the_program_is_the_one_without_weights(n, weight_fn):
    assert _program(n, weight_fn) == _program(n, None)


@every_n
def test_it_divides_a_sum(n):
    step = optaccum.value_and_grad(
        lambda w, x: jnp.sum(x @ w),
        num_microbatches=n,
        weight_fn=lambda w, x: len(x),
        loss_reduction="sum",
    )
    loss, grads = jax.jit(step)(W, X)
    np.testing.assert_allclose(loss, jnp.mean(X @ W), rtol=1e-5)
    np.testing.assert_allclose(grads, jnp.mean(X, axis=0), rtol=1e-5)


@every_n
@pytest.mark.parametrize("weight", [0, 1e-33, -1.0, np.nan, np.inf])
def test_others_count_nothing(n, weight):
    step = optaccum.value_and_grad(_loss, num_microbatches=n, weight_fn=lambda w, x: weight)
    for run in (step, jax.jit(step)):
        loss, grads = run(W, X)
        assert (float(loss), [*map(float, grads)]) == (0, [0, 0, 0])


@pytest.mark.parametrize("summed", [False, True])
def test_in_a_shard_map_all_devices_count_alike(summed):
    step = optaccum.value_and_grad(
        (lambda w, x: jnp.sum(x @ w)) if summed else _loss,
        num_microbatches=2,
        weight_fn=lambda w, x: len(x),
        loss_reduction="sum" if summed else "mean",
        reduce_axes="data",
    )
    mesh = make_mesh(AxisType.Auto, 4)
    run = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    loss, grads = jax.jit(run)(W, X)
    wanted = jax.value_and_grad((lambda w, x: jnp.mean(x @ w)) if summed else _loss)(W, X)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(grads, wanted[1], rtol=1e-5)
