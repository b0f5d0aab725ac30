"""Random parts on eight devices against the oracle: weights, rejections and lengths of windows."""

import functools

from helpers.meshes import DEVICES, make_mesh
from helpers.properties import STABLE, UNIT_ROUNDOFF
from helpers.steps import recording
from helpers.tokens import SPECS
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest
import reference

import optaccum

pytestmark = pytest.mark.slow

BAD = [-1.0, np.nan, np.inf]


@functools.cache
def programs(use_grad_mean):
    """Returns `init` and a step, compiled once for all lengths of the window."""
    mesh = make_mesh(AxisType.Auto)

    def transformation(every_k):
        return optaccum.accumulate(
            every_k,
            recording(),
            use_grad_mean=use_grad_mean,
            should_skip_update_fn=optaccum.skip_not_finite,
            average_args=("value",),
            reduce_axes="data",
        )

    def step(state, every_k, grads, weight, value):
        return transformation(every_k).update(
            grads[0], state, jnp.zeros(3), weight=weight[0], value=value[0]
        )

    parts = P("data")
    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(SPECS, P(), parts, parts, parts),
        out_specs=(P(), SPECS),
    )
    init = jax.shard_map(
        lambda: transformation(2).init(jnp.zeros(3)), mesh=mesh, in_specs=(), out_specs=SPECS
    )
    return jax.jit(init), jax.jit(step)


@hypothesis.settings(STABLE, max_examples=40)
@hypothesis.given(
    every_k=st.integers(1, 4),
    microbatches=st.integers(4, 12),
    zeros=st.floats(0, 1),
    bad=st.sampled_from([0.0, 0.02, 0.2]),
    use_grad_mean=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_on_devices_match_the_oracle(every_k, microbatches, zeros, bad, use_grad_mean, seed):
    rng = np.random.default_rng(seed)
    init, step = programs(use_grad_mean)
    state, batches, outcomes = init(), [], []
    for _ in range(microbatches):
        # Small integers, whose sums are exact: only the division rounds.
        grads = rng.integers(-64, 65, (DEVICES, 3)).astype(np.float32)
        value = rng.integers(-64, 65, DEVICES).astype(np.float32)
        weight = np.where(rng.random(DEVICES) < zeros, 0, rng.integers(1, 9, DEVICES))
        weight = weight.astype(np.float32)
        grads[rng.random(grads.shape) < bad / 8] = np.nan
        broken = rng.random(DEVICES) < bad
        weight[broken] = rng.choice(BAD, broken.sum())
        updates, state = step(state, jnp.int32(every_k), grads, weight, value)
        outcomes.append((updates, state))
        counted = np.where(broken, 0, weight).astype(np.float64)
        total = counted.sum()
        rejected = bool(np.isnan(grads).any())
        mean = np.nan_to_num(counted @ grads / max(total, 1))
        args = {"value": counted @ value / max(total, 1)}
        batches.append(reference.Microbatch([mean], total, rejected=rejected, args=args))
    records = reference.simulate(batches, every_k, use_grad_mean=use_grad_mean)
    tolerance = {"rtol": 4 * UNIT_ROUNDOFF, "atol": 1e-12}
    for record, (updates, state) in zip(records, outcomes, strict=True):
        assert bool(state.released) == record.released
        counters = state.mini_step, state.gradient_step, state.skipped
        assert [*map(int, counters)] == [record.mini_step, record.gradient_step, record.skipped]
        expected = record.gradient[0] if record.released else np.zeros(3)
        np.testing.assert_allclose(updates, expected, **tolerance)
        assert float(state.weight.sum()) == record.weight
        np.testing.assert_allclose(state.grad_sum.sum(axis=0), record.grad_sum[0], **tolerance)
        if record.released:
            np.testing.assert_allclose(state.inner_state.value, record.args["value"], **tolerance)
