"""How rows are cut into microbatches: stacked, as many as a program finds, or of several counts."""

import functools

from helpers import meshes
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest

import optaccum

N, M = 5, 6
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = jax.random.normal(KEYS[0], (3, 4, 4))
X = jax.random.normal(KEYS[1], (N, M, 4))
MASK = jnp.where(jax.random.uniform(KEYS[2], (N, M)) > 0.4, 1.0, 0.0).at[1].set(0.0)
# Sums of some hundred float32 products, in another order.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def loss_fn(params, x, mask, count=None):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)
    return jnp.sum(mask[:, None] * h**2) / jnp.sum(mask)


def tokens(params, x, mask, count=None):
    return jnp.sum(mask)


def mean_fn(params, x, mask, count=None):
    return jnp.mean(jnp.tanh(x @ params[0]) ** 2)


OPTIONS = {"batch_argnums": (1, 2), "batch_layout": "stacked"}
COUNTED = OPTIONS | {"num_microbatches": lambda params, x, mask, count: count}
WAYS = {
    "value_and_grad": optaccum.value_and_grad,
    "microbatched_loss": lambda *args, **options: jax.value_and_grad(
        optaccum.microbatched_loss(*args, **options)
    ),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def expected_of(fun, k):
    """Returns loss and gradient of the first k microbatches: of their tokens, or of equal means."""
    if k == 0:
        return 0.0, np.zeros(PARAMS.shape)
    if fun is loss_fn:
        rows = X[:k].reshape(-1, 4), MASK[:k].reshape(-1)
        return jax.value_and_grad(loss_fn)(PARAMS, *rows)
    return jax.value_and_grad(mean_fn)(PARAMS, X[:k].reshape(-1, 4), None)


@every_way
@pytest.mark.parametrize("fun", [loss_fn, mean_fn])
def test_one_program_runs_as_many_microbatches_as_are_real(way, fun):
    """The others hold NaN, as memory that nobody has written may."""
    options = COUNTED | ({"weight_fn": tokens} if fun is loss_fn else {})
    step = jax.jit(way(fun, **options))
    for count in (0, 1, 3, N, N + 4, -2):
        k = max(0, min(count, N))
        found = step(PARAMS, X.at[k:].set(jnp.nan), MASK, jnp.int32(count))
        jax.tree.map(assert_close, found, expected_of(fun, k))
    assert step._cache_size() == 1


@pytest.mark.parametrize("differentiated", [True, False])
def test_the_time_is_that_of_the_real_microbatches(differentiated):
    runs = []

    def counting(params, x, mask, count):
        jax.debug.callback(lambda: runs.append(1))
        return mean_fn(params, x, mask)

    loss = optaccum.microbatched_loss(counting, **COUNTED)
    step = jax.jit(optaccum.grad(counting, **COUNTED) if differentiated else loss)
    for count in (3, 0, 2):
        runs.clear()
        jax.block_until_ready(step(PARAMS, X, MASK, jnp.int32(count)))
        jax.effects_barrier()
        assert len(runs) == count


def test_a_function_is_traced_once_and_a_known_count_gives_the_same():
    calls = []

    def counted(params, x, mask):
        calls.append(1)
        return mean_fn(params, x, mask)

    step = jax.jit(
        optaccum.value_and_grad(counted, **(OPTIONS | {"num_microbatches": lambda *args: 3}))
    )
    jax.tree.map(assert_close, step(PARAMS, X, MASK), expected_of(mean_fn, 3))
    assert len(calls) == 1


def test_only_real_microbatches_hand_on_the_carry_and_have_aux():
    def fun(params, carry, x, key, count):
        return jnp.mean(x @ params[0]), (
            carry + 1,
            {"key": jax.random.uniform(key), "sum": x.sum()},
        )

    step = optaccum.value_and_grad(
        fun,
        has_aux=True,
        num_microbatches=lambda *args: args[-1],
        batch_argnums=2,
        batch_layout="stacked",
        carry_argnum=1,
        rng_argnums=3,
    )
    key = jax.random.key(3)
    (_, (carry, aux)), _ = jax.jit(step)(PARAMS, 0, X, key, jnp.int32(2))
    drawn = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(2)]
    assert int(carry) == 2
    np.testing.assert_array_equal(aux["key"], [*drawn, 0, 0, 0])
    assert_close(aux["sum"], [X[0].sum(), X[1].sum(), 0, 0, 0])


@every_way
def test_without_a_count_all_stacked_microbatches_are_real(way):
    step = way(loss_fn, num_microbatches=N, weight_fn=tokens, **OPTIONS)
    jax.tree.map(assert_close, jax.jit(step)(PARAMS, X, MASK), expected_of(loss_fn, N))
    one = way(mean_fn, num_microbatches=1, **OPTIONS)
    jax.tree.map(assert_close, one(PARAMS, X[:1], MASK[:1]), expected_of(mean_fn, 1))


def test_sums_of_losses_are_divided_by_the_weight_of_the_real_ones():
    def sum_fn(params, x, mask, count):
        return jnp.sum(mask[:, None] * jnp.tanh(x @ params[0]))

    step = optaccum.grad(sum_fn, loss_reduction="sum", weight_fn=tokens, **COUNTED)
    found = step(PARAMS, X.at[3:].set(jnp.nan), MASK, 3)
    expected = jax.grad(sum_fn)(PARAMS, X[:3].reshape(-1, 4), MASK[:3].reshape(-1), 3)
    assert_close(found, expected / MASK[:3].sum())


@every_way
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("counts", [(0, 3, 1, 5, 2, 0, 4, 1), (0,) * 8])
def test_devices_that_have_different_counts_run_alike(way, weighted, counts):
    mesh = meshes.make_mesh(AxisType.Auto)
    x = jax.random.normal(KEYS[3], (8, N, M, 4))
    mask = jnp.tile(MASK[None], (8, 1, 1))
    real = jnp.arange(N) < jnp.array(counts)[:, None]
    poisoned = jnp.where(real[:, :, None, None], x, jnp.nan)
    fun = loss_fn if weighted else mean_fn
    options = COUNTED | ({"weight_fn": tokens} if weighted else {})
    step = way(fun, reduce_axes="data", **options)

    def on_one(params, x, mask, count):
        return step(params, x[0], mask[0], count[0])

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(on_one, in_specs=(P(), *[P("data")] * 3), out_specs=P())
        found = jax.jit(mapped)(PARAMS, poisoned, mask, jnp.array(counts, jnp.int32))
    if sum(counts) == 0:
        expected = 0.0, np.zeros(PARAMS.shape)
    else:
        rows = np.asarray(real).reshape(-1)
        x, mask = x.reshape(-1, M, 4)[rows].reshape(-1, 4), mask.reshape(-1, M)[rows].reshape(-1)
        expected = jax.value_and_grad(fun)(PARAMS, x, mask)
    jax.tree.map(assert_close, found, expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_a_count_of_a_narrow_dtype_does_not_wrap(dtype):
    def fun(w, x):
        return w * jnp.mean(x)

    step = optaccum.value_and_grad(
        fun, num_microbatches=lambda w, x: jnp.asarray(100, dtype), batch_layout="stacked"
    )
    x = jnp.arange(300.0)[:, None]  # 300 is 44 in 8 bits
    loss, _ = jax.jit(step)(1.0, x)
    assert loss == jnp.mean(x[:100])


# Rows of different counts.


def pairs_fn(params, batch):
    """Has one hard row for each anchor, and three negatives: a loss of their means."""
    anchors, negatives = (jnp.tanh(batch[name] @ params[0]) for name in ("anchor", "negative"))
    return jnp.mean(anchors**2) + jnp.mean(negatives**2)


UNEVEN = {
    "anchor": jax.random.normal(KEYS[1], (12, 4)),
    "negative": jax.random.normal(KEYS[2], (36, 4)),
}


@every_way
@pytest.mark.parametrize("n", [1, 3])
def test_each_leaf_is_split_by_its_rows(way, n):
    step = way(pairs_fn, num_microbatches=n, batch_layout="uneven")
    jax.tree.map(
        assert_close, jax.jit(step)(PARAMS, UNEVEN), jax.value_and_grad(pairs_fn)(PARAMS, UNEVEN)
    )


def test_a_microbatch_takes_its_share_of_each():
    def fun(w, batch):
        return w, batch

    step = optaccum.value_and_grad(fun, has_aux=True, num_microbatches=2, batch_layout="uneven")
    (_, seen), _ = step(1.0, {"a": jnp.arange(2), "b": jnp.arange(6)})
    np.testing.assert_array_equal(seen["a"], [[0], [1]])
    np.testing.assert_array_equal(seen["b"], [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize("layout", ["rows", "uneven"])
def test_even_rows_are_one_program_in_both_layouts(layout):
    def text(**options):
        step = optaccum.value_and_grad(pairs_fn, num_microbatches=3, **options)
        batch = {"anchor": UNEVEN["anchor"], "negative": UNEVEN["anchor"]}
        return jax.jit(step).lower(PARAMS, batch).as_text()

    assert text() == text(batch_layout=layout)


@pytest.mark.parametrize(
    ("options", "args", "error", "text"),
    [
        (
            {"batch_layout": "ragged"},
            (X,),
            ValueError,
            "`batch_layout` must be 'rows', 'uneven' or 'stacked', got 'ragged'",
        ),
        (
            {},
            (UNEVEN,),
            ValueError,
            r"'anchor'\] has 12 and .*'negative'\] has 36; pass `batch_layout='uneven'` to split",
        ),
        (
            {"batch_layout": "uneven", "num_microbatches": 4},
            ({"a": jnp.ones(4), "b": jnp.ones(6)},),
            ValueError,
            r"does not divide the 6 rows in batch leaf argument 1\['b'\]",
        ),
        (
            {"batch_layout": "stacked"},
            (X,),
            ValueError,
            r"must be \[2, rows, ...\] with `batch_layout` 'stacked', 2 microbatches, got float32",
        ),
        (
            {"num_microbatches": lambda w, x: 2},
            (X,),
            ValueError,
            r"`num_microbatches` is a function.*pass `batch_layout='stacked'`",
        ),
        (
            {"num_microbatches": lambda w, x: 2.0, "batch_layout": "stacked"},
            (X,),
            TypeError,
            r"`num_microbatches\(...\)` must be a scalar \(integer\), got 2.0",
        ),
        (
            {"num_microbatches": lambda w, x: 2, "batch_layout": "stacked"},
            (jnp.ones(()),),
            ValueError,
            r"must be \[1, rows, ...\] with `batch_layout` 'stacked'",
        ),
        (
            {"batch_layout": "stacked", "num_microbatches": N},
            (X, jnp.ones(N)),
            ValueError,
            r"argument 2 has 5 rows, as many as the batch",
        ),
    ],
)
@every_way
def test_what_cannot_be_cut_is_refused(way, options, args, error, text):
    with pytest.raises(error, match=text):
        way(lambda w, *_: w, **({"num_microbatches": 2} | options))(1.0, *args)
