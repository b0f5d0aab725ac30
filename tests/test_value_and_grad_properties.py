"""Random batches against the oracle: trees, dtypes, uneven weights, microbatches without weight."""

from helpers.properties import DTYPES, STABLE, draw, mean_bound, wide
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import optaccum

pytestmark = pytest.mark.slow

leaves = st.tuples(st.lists(st.integers(0, 3), max_size=2).map(tuple), st.sampled_from(DTYPES))
trees = st.lists(st.none() | leaves, min_size=1, max_size=3)
weights = st.one_of(
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
    tree=trees,
    weights=st.lists(weights, min_size=1, max_size=5),
    size=st.sampled_from([1, 2]),
    nan=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_batches(tree, weights, size, nan, seed):
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
