"""Random batches against the oracle: trees, dtypes, uneven weights, microbatches without weight."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import reference

import optaccum

STABLE = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
DTYPES = [jnp.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64)]
UNIT_ROUNDOFF = float(np.finfo(np.float32).eps) / 2

leaves = st.tuples(st.lists(st.integers(0, 3), max_size=2).map(tuple), st.sampled_from(DTYPES))
trees = st.lists(st.none() | leaves, min_size=1, max_size=3)
weights = st.sampled_from([0.0, -1.0, float("nan"), float("inf")]) | st.floats(
    2**-10, 2**10, width=32
)


def _draw(rng, shape, dtype):
    # Multiples of 2^-5 up to 2: exact in every dtype, and so is the mean of two.
    x = rng.integers(-64, 65, shape) / 32
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.integers(-64, 65, shape) / 32
    return np.asarray(x).astype(dtype)


def _loss(params, batch):
    """Its gradient is the mean of the rows, leaf by leaf; its value at zeros, that of `loss`."""

    def term(p, x):
        return jnp.real(jnp.sum(jnp.mean(x * p, axis=0))).astype(jnp.float32)

    terms = jax.tree.leaves(jax.tree.map(term, params, batch["rows"]))
    return sum(terms, jnp.float32(0)) + jnp.mean(batch["loss"])


@STABLE
@hypothesis.given(
    tree=trees,
    weights=st.lists(weights, min_size=1, max_size=5),
    size=st.sampled_from([1, 2]),
    nan=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_batches(tree, weights, size, nan, seed):
    rng, n = np.random.default_rng(seed), len(weights)
    valid = [0 < w < np.inf for w in weights]
    params = [None if leaf is None else np.zeros(*leaf) for leaf in tree]
    hypothesis.assume(any(leaf is not None for leaf in tree))
    rows = [None if leaf is None else _draw(rng, (size, n, *leaf[0]), leaf[1]) for leaf in tree]
    losses = _draw(rng, (size, n), np.dtype(np.float32))
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
            [None if x is None else _wide(x[:, i]).mean(axis=0) for x in [*rows, losses]],
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
        # As in test_properties: 2 n + 4 roundings in float32, then one in the leaf's dtype.
        info = jnp.finfo(x.dtype)
        bound = 1.1 * (2 * n + 4) * UNIT_ROUNDOFF * scale
        bound = bound + float(info.eps) / 2 * (np.abs(exact) + bound)
        bound = bound + float(info.smallest_subnormal)
        assert np.all(np.abs(_wide(x) - exact) <= bound)


def _wide(x):
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)
