"""Random windows against the oracle: trees, dtypes, weights, skips, releases, devices."""

import dataclasses
import functools
from typing import Any

from helpers.meshes import DEVICES, make_mesh
from helpers.properties import DTYPES, STABLE, UNIT_ROUNDOFF, draw, mean_bound, wide
from helpers.steps import STEPS, recording
from helpers.tokens import SPECS
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest
import reference

import optaccum

pytestmark = pytest.mark.slow

BAD_WEIGHTS = [-1.0, -1e-30, float("nan"), float("inf"), float("-inf")]
EXTREME_WEIGHTS = [1e-40, 1e-33, 2.0**-101, 2.0**-100, 2.0**125, 2.0**126, 3e38]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape and dtype of a gradient leaf."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def draw(self, rng: np.random.Generator, nan: bool) -> np.ndarray:
        x = draw(rng, self.shape, self.dtype)
        if nan and x.size:
            x.reshape(-1)[rng.integers(x.size)] = np.nan
        return x


leaves = st.builds(
    Leaf,
    shape=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    dtype=st.sampled_from(DTYPES),
)
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.dictionaries(st.sampled_from("abc"), st.none() | children, min_size=1, max_size=3),
        st.lists(st.none() | children, min_size=1, max_size=2).map(tuple),
    ),
    max_leaves=4,
)
weights = st.one_of(
    st.just(0.0),
    st.sampled_from(BAD_WEIGHTS),
    st.sampled_from(EXTREME_WEIGHTS),
    st.floats(2**-10, 2**10, width=32),
    st.floats(2**-10, 2**10, width=32),
)


@st.composite
def microbatches(draw: st.DrawFn, weights: st.SearchStrategy[float]) -> dict[str, Any]:
    return {
        "nan": draw(st.sampled_from([False, False, False, True])),
        "weight": draw(weights),
        "release": draw(st.sampled_from([None, None, None, True, False])),
        "traced": draw(st.booleans()),
    }


def _jitted(tx: optax.GradientTransformation, api: str) -> Any:
    """Returns a step whose `release` is traced if it is an array, and static otherwise."""
    step = functools.partial(STEPS[api], tx)
    static = jax.jit(step, static_argnames="release")
    traced = jax.jit(step)

    def call(*args, release, **kwargs):
        return (traced if isinstance(release, jax.Array) else static)(
            *args, release=release, **kwargs
        )

    return call


def _assert_close(actual: Any, exact: np.ndarray | None, scale: np.ndarray | None, terms: int):
    """Compares one leaf of the released gradient with the oracle's."""
    if exact is None or scale is None:
        assert actual is None
        return
    bound = mean_bound(actual.dtype, exact, scale, terms)
    found = wide(actual)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    known = ~np.isnan(exact)
    assert np.all(np.abs(found - exact)[known] <= np.broadcast_to(bound, known.shape)[known])


def _check(record, params, state):
    """Compares what one call left behind with what the oracle says."""
    assert bool(optaccum.has_released(state)) == record.released
    counters = ("mini_step", "gradient_step", "skipped")
    assert {name: int(getattr(state, name)) for name in counters} == {
        name: getattr(record, name) for name in counters
    }
    assert int(state.inner_state.count) == record.gradient_step
    np.testing.assert_allclose(state.weight, record.weight, rtol=16 * UNIT_ROUNDOFF)
    flat = jax.tree.leaves(params, is_leaf=lambda x: x is None)
    for i, leaf in enumerate(flat):
        if record.gradient is None:
            assert leaf is None or not np.any(np.asarray(leaf)), "a hold is not exactly zero"
        else:
            _assert_close(leaf, record.gradient[i], record.error_scale[i], record.terms)
    if record.args is not None:
        # As above; values are positive, so their mean is the scale of its own error.
        bound = 1.1 * (2 * record.terms + 4) * UNIT_ROUNDOFF * record.args["value"]
        assert abs(float(state.inner_state.value) - record.args["value"]) <= bound
    sums = jax.tree.leaves(state.grad_sum, is_leaf=lambda x: x is None)
    for leaf in sums:
        assert leaf is None or leaf.dtype in (jnp.float32, jnp.complex64)


def _run(tree, calls, tx, every_k, *, api, seed, skip_nan, use_grad_mean, static_weight=False):
    rng = np.random.default_rng(seed)
    flat, structure = jax.tree.flatten(tree, is_leaf=lambda x: x is None or isinstance(x, Leaf))
    # Zero parameters before every call: what comes back is what was released.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
    step, state = _jitted(tx, api), tx.init(zeros)
    batches, outcomes = [], []
    for call in calls:
        gradient = [None if leaf is None else leaf.draw(rng, call["nan"]) for leaf in flat]
        holds_nan = any(g is not None and np.any(np.isnan(g)) for g in gradient)
        value = float(rng.integers(1, 65) / 32)
        release = call["release"]
        if release is not None and call["traced"]:
            release = jnp.asarray(release)
        weight = call["weight"]
        if not use_grad_mean and 2**10 < weight < float("inf"):
            weight = 1.0  # its sum would not fit into the dtype of a narrow gradient
        params, state = step(
            jax.tree.unflatten(structure, gradient),
            state,
            zeros,
            release=release,
            weight=weight if static_weight else jnp.float32(weight),
            value=value,
        )
        outcomes.append((params, state))
        batches.append(
            reference.Microbatch(
                gradient,
                float(np.float32(weight)),
                call["release"],
                rejected=skip_nan and holds_nan,
                args={"value": value},
            )
        )
    records = reference.simulate(batches, every_k, use_grad_mean=use_grad_mean)
    for record, (params, state) in zip(records, outcomes, strict=True):
        _check(record, params, state)


@hypothesis.settings(STABLE, max_examples=24)
@hypothesis.given(
    tree=trees,
    calls=st.lists(microbatches(weights), min_size=4, max_size=16),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scheduled=st.booleans(),
    skip_nan=st.booleans(),
    use_grad_mean=st.booleans(),
    api=st.sampled_from(sorted(STEPS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_window_matches_the_oracle(
    tree, calls, lengths, scheduled, skip_nan, use_grad_mean, api, seed
):
    """Whatever comes in: released gradients, averaged values and every counter are the oracle's."""
    table = jnp.asarray(lengths)
    tx = optaccum.accumulate(
        (lambda step: table[jnp.minimum(step, len(lengths) - 1)]) if scheduled else lengths[0] + 1,
        recording(),
        use_grad_mean=use_grad_mean,
        should_skip_update_fn=optax.skip_not_finite if skip_nan else None,
        average_args=("value",),
    )
    every_k = (lambda step: lengths[min(step, len(lengths) - 1)]) if scheduled else lengths[0] + 1
    _run(
        tree,
        calls,
        tx,
        every_k,
        api=api,
        seed=seed,
        skip_nan=skip_nan,
        use_grad_mean=use_grad_mean,
    )


@hypothesis.settings(STABLE, max_examples=5)
@hypothesis.given(
    tree=trees,
    calls=st.lists(microbatches(weights), min_size=3, max_size=6),
    every_k=st.integers(2, 3),
    use_grad_mean=st.booleans(),
    api=st.sampled_from(sorted(STEPS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_known_at_trace_time_match_the_oracle(
    tree, calls, every_k, use_grad_mean, api, seed
):
    """Python weights are judged while tracing, the window they make is the same."""
    tx = optaccum.accumulate(
        every_k, recording(), use_grad_mean=use_grad_mean, average_args=("value",)
    )
    _run(
        tree,
        calls,
        tx,
        every_k,
        api=api,
        seed=seed,
        skip_nan=False,
        use_grad_mean=use_grad_mean,
        static_weight=True,
    )


@hypothesis.settings(STABLE, max_examples=6)
@hypothesis.given(
    tree=trees,
    calls=st.lists(microbatches(weights), min_size=2, max_size=6),
    skip_nan=st.booleans(),
    use_grad_mean=st.booleans(),
    api=st.sampled_from(sorted(STEPS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_of_one_match_the_oracle(tree, calls, skip_nan, use_grad_mean, api, seed):
    """Without an accumulator the semantics are the same, less a window to keep open."""
    calls = [{**call, "release": call["release"] or None, "traced": False} for call in calls]
    tx = optaccum.accumulate(
        1,
        recording(),
        use_grad_mean=use_grad_mean,
        should_skip_update_fn=optax.skip_not_finite if skip_nan else None,
        average_args=("value",),
    )
    _run(
        tree,
        calls,
        tx,
        1,
        api=api,
        seed=seed,
        skip_nan=skip_nan,
        use_grad_mean=use_grad_mean,
    )


def test_the_oracle_agrees_with_windows_by_hand():
    """Windows worked out by hand, so that the oracle is not only compared with the library."""
    g = [np.asarray([2.0]), None]
    nan = [np.asarray([np.nan]), None]
    records = reference.simulate(
        [
            reference.Microbatch(g, 1.0, args={"value": 1.0}),
            reference.Microbatch(nan, 7.0, release=True, rejected=True, args={"value": 9.0}),
            reference.Microbatch([np.asarray([6.0]), None], 3.0, args={"value": 5.0}),
            reference.Microbatch(nan, 0.0, args={"value": 9.0}),
            reference.Microbatch(g, 0.0, args={"value": 9.0}),
            reference.Microbatch(g, 2.0, release=True, args={"value": 3.0}),
            reference.Microbatch(g, -1.0, args={"value": 3.0}),
            reference.Microbatch(g, 1.0, release=False, args={"value": 3.0}),
        ],
        lambda step: 2 if step == 0 else 1 + step,
    )
    assert [r.released for r in records] == [False, False, True, False, False, True, False, False]
    assert [r.mini_step for r in records] == [1, 1, 0, 1, 0, 0, 0, 1]
    assert [r.gradient_step for r in records] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [r.skipped for r in records] == [0, 1, 1, 1, 1, 1, 2, 2]
    assert [r.weight for r in records] == [1, 1, 4, 0, 0, 2, 2, 1]
    assert records[2].gradient == [np.asarray([5.0]), None]
    assert records[2].args == {"value": 4.0}
    assert records[5].gradient == [np.asarray([2.0]), None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_release_is_rounded_once(dtype):
    """(1 + 2^-12) / 3 comes out as the nearest number of the gradient's dtype."""
    tx = optaccum.accumulate(3, optax.identity())
    state = tx.init({"w": jnp.zeros([], dtype)})
    updates = None
    for g in (1.0, 2.0**-12, 0.0):
        updates, state = tx.update({"w": jnp.asarray(g, dtype)}, state)
    nearest = np.asarray((1 + 2.0**-12) / 3).astype(dtype)
    assert updates is not None
    assert updates["w"].dtype == dtype
    assert np.abs(np.complex128(updates["w"]) - np.complex128(nearest)) <= 2**-25


# In one step.


batch_leaves = st.tuples(
    st.lists(st.integers(0, 3), max_size=2).map(tuple), st.sampled_from(DTYPES)
)
batch_trees = st.lists(st.none() | batch_leaves, min_size=1, max_size=3)
batch_weights = st.one_of(
    st.sampled_from([0.0, -1.0, float("nan"), float("inf")]),
    st.sampled_from([1e-40, 2.0**-101, 2.0**-100, 2.0**125, 2.0**126]),
    st.floats(2**-10, 2**10, width=32),
    st.floats(2**-10, 2**10, width=32),
)


def _loss(params, batch):
    """Its gradient is the mean of the rows, leaf by leaf; its value at zeros, that of `loss`."""

    def term(p, x):
        return jnp.real(jnp.sum(jnp.mean(x * p, axis=0))).astype(jnp.float32)

    terms = jax.tree.leaves(jax.tree.map(term, params, batch["rows"]))
    return sum(terms, jnp.float32(0)) + jnp.mean(batch["loss"])


@hypothesis.settings(STABLE, max_examples=20)
@hypothesis.given(
    tree=batch_trees,
    weights=st.lists(batch_weights, min_size=1, max_size=5),
    size=st.sampled_from([1, 2]),
    nan=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_batch_in_one_step_matches_the_oracle(tree, weights, size, nan, seed):
    rng, n = np.random.default_rng(seed), len(weights)
    total, valid = 0.0, []
    for w in weights:
        valid.append(w >= reference.SMALLEST and total + w <= reference.LARGEST)
        total += w if valid[-1] else 0.0
    params = [None if leaf is None else np.zeros(*leaf) for leaf in tree]
    hypothesis.assume(any(leaf is not None for leaf in tree))
    rows = [None if leaf is None else draw(rng, (size, n, *leaf[0]), leaf[1]) for leaf in tree]
    losses = draw(rng, (size, n), np.dtype(np.float32))
    if nan:  # where there is no weight there may be anything
        for x in [losses, *(x for x in rows if x is not None)]:
            x[:, ~np.array(valid)] = np.nan

    def flat(x):
        return None if x is None else x.reshape(size * n, *x.shape[2:])

    batch = {
        "rows": [flat(x) for x in rows],
        "loss": flat(losses),
        "weight": np.tile(np.float32(weights), size),
    }
    step = optaccum.value_and_grad(
        _loss, num_microbatches=n, weight_fn=lambda params, batch: batch["weight"][0]
    )
    loss, grads = jax.jit(step)(params, batch)

    window = [
        reference.Microbatch(
            [None if x is None else wide(x[:, i]).mean(axis=0) for x in [*rows, losses]],
            weights[i],
        )
        for i in range(n)
        if valid[i]
    ]
    if not window:
        assert not loss
        assert not any(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))
        return
    record = reference.simulate(window, every_k=len(window))[-1]
    actual = [*grads, loss]
    for x, p, exact, scale in zip(
        actual, [*params, losses], record.gradient, record.error_scale, strict=True
    ):
        if exact is None:
            assert x is None
            continue
        assert x.dtype == p.dtype
        assert np.all(np.abs(wide(x) - exact) <= mean_bound(x.dtype, exact, scale, n))


# Parts on eight devices.


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
