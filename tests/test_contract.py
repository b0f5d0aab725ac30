"""What every transformation here promises as an Optax transformation, whatever its options."""

import functools
import warnings

import equinox as eqx
from helpers.steps import every_step, update_and_apply
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaccum import accumulate, apply_gradients, get_state

PARAMS = {
    "f32": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3),
    "bf16": jnp.ones(4, jnp.bfloat16),
    "scalar": jnp.ones(()),
}
MICROBATCHES = 8


def _begins_with_numbers():
    """An optimizer whose state begins as a Python number and a weakly typed array."""

    def update_fn(updates, state, params=None):
        steps, scale = state
        return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates), (steps + 1, scale / 2)

    return optax.GradientTransformation(lambda params: (0, jnp.asarray(0.1)), update_fn)


FACTORIES = {
    "bare": lambda: accumulate(4),
    "adamw": lambda: accumulate(4, optax.adamw(0.1)),
    "one": lambda: accumulate(1, optax.adamw(0.1)),
    "function": lambda: accumulate(lambda step: jnp.where(step < 1, 2, 5), optax.adamw(0.1)),
    "array": lambda: accumulate(jnp.int32(4), optax.adamw(0.1)),
    "sum": lambda: accumulate(4, optax.adamw(0.1), use_grad_mean=False),
    "skip": lambda: accumulate(4, optax.adamw(0.1), should_skip_update_fn=optax.skip_not_finite),
    "average": lambda: accumulate(4, optax.adamw(0.1), average_args=("value",)),
    "bf16 sums": lambda: accumulate(4, optax.adamw(0.1), accumulator_dtype=jnp.bfloat16),
    "chain": lambda: optax.chain(optax.clip(1.0), accumulate(4, optax.adamw(0.1))),
    "mixed precision": lambda: accumulate(4, optax.adamw(0.1, mu_dtype=jnp.bfloat16)),
    "numbers": lambda: accumulate(4, _begins_with_numbers()),
    "plateau": lambda: accumulate(
        4, optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    ),
}


def _gradients(i, dtype=None):
    keys = jax.random.split(jax.random.key(i), len(PARAMS))
    return {
        name: jax.random.normal(key, p.shape).astype(dtype or p.dtype)
        for key, (name, p) in zip(keys, PARAMS.items(), strict=True)
    }


every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
# Each takes another path through the transformation; the rest differ in dtypes alone.
PATHS = ("bare", "adamw", "one", "function", "skip", "average")
every_path = pytest.mark.parametrize("factory", [FACTORIES[path] for path in PATHS], ids=PATHS)


def _types(tree):
    return [(jnp.shape(x), x.dtype, jax.typeof(x).weak_type) for x in jax.tree.leaves(tree)]


def _assert_close(actual, expected):
    # Programs fused differently round differently, a few times per microbatch, in a leaf's dtype.
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        dtype = jnp.result_type(a)
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        eps = 0.0
        if jnp.issubdtype(dtype, jnp.inexact):
            eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(a, e, rtol=4 * MICROBATCHES * eps, atol=4 * MICROBATCHES * eps)


@functools.cache
def _jitted(factory):
    """Returns a transformation and its jitted step, which several tests share."""
    tx = factory()
    return tx, jax.jit(functools.partial(apply_gradients, tx))


@every_path
def test_jit_equals_eager(factory):
    tx, jitted = _jitted(factory)
    extra = {"value": 1.0}
    params, state = PARAMS, tx.init(PARAMS)
    eager_params, eager_state = PARAMS, state
    for i in range(MICROBATCHES):
        params, state = jitted(_gradients(i), state, params, **extra)
        eager_params, eager_state = apply_gradients(
            tx, _gradients(i), eager_state, eager_params, **extra
        )
    _assert_close((params, state), (eager_params, eager_state))


@pytest.mark.parametrize(
    ("factory", "dtype"),
    [
        *(pytest.param(factory, None, id=name) for name, factory in FACTORIES.items()),
        *(pytest.param(FACTORIES[name], jnp.float32, id=f"{name}, wider") for name in PATHS),
        *(pytest.param(FACTORIES[name], jnp.float16, id=f"{name}, other") for name in PATHS),
    ],
)
@every_step
def test_types_are_stable_and_strong(factory, step, dtype):
    tx = factory()
    state = tx.init(PARAMS)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert not any(weak for *_, weak in _types(get_state(state)))
    grads = _gradients(0, dtype)
    for extra in ({}, {"weight": jnp.float32(2)}, {"release": True}, {"release": False}):
        if extra.get("release") is False and factory is FACTORIES["one"]:
            continue  # has no accumulator to hold in
        run = functools.partial(step, tx, value=1.0, **extra)
        new_params, new_state = jax.eval_shape(run, grads, state, PARAMS)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert _types(new_state) == _types(state)
        assert _types(new_params) == _types(PARAMS)


@every_factory
def test_ten_steps_are_one_trace_and_donate_without_warnings(factory):
    tx, traces = factory(), []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, grads):
        traces.append(None)
        return apply_gradients(tx, grads, state, params, value=jnp.float32(1))

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(10):
            params, state = train_step(params, state, _gradients(i))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(optax.contrib.dog(1.0), id="dog"),
        pytest.param(optax.contrib.prodigy(), id="prodigy"),
        pytest.param(optax.lbfgs(), id="lbfgs"),
    ],
)
def test_an_optimizer_that_begins_with_the_parameters_can_be_donated_beside_them(inner):
    tx = accumulate(2, inner, average_args=("value",), window_args=("value_fn",))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x):
        value, grads = jax.value_and_grad(lambda p: jnp.sum((p - x) ** 2))(params)
        extra = {"value": value, "grad": grads, "value_fn": lambda p: jnp.sum((p - x) ** 2)}
        return apply_gradients(tx, grads, state, params, **extra)

    params = jnp.ones(3)
    state = tx.init(params)
    for _ in range(2):
        params, state = train_step(params, state, 3.0)
    assert jnp.isfinite(params).all()


def test_init_copies_only_what_would_be_donated_twice():
    params, table = jnp.ones(3), jnp.arange(3.0)
    update = optax.identity().update
    inner = optax.GradientTransformation(lambda params: [params, table, table], update)
    begun, first, again = accumulate(2, inner).init(params).inner_state
    assert first is table
    assert begun is not params
    assert again is not table


@every_path
def test_scan_equals_a_loop(factory):
    tx, jitted = _jitted(factory)

    def body(carry, grads):
        params, state = carry
        return apply_gradients(tx, grads, state, params, value=1.0), None

    carry = PARAMS, tx.init(PARAMS)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *map(_gradients, range(MICROBATCHES)))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, batches))(carry)
    params, state = carry
    for i in range(MICROBATCHES):
        params, state = jitted(_gradients(i), state, params, value=1.0)
    _assert_close(scanned, (params, state))


@every_path
def test_members_of_a_vmap_release_at_different_times(factory):
    tx, jitted = _jitted(factory)
    run, members = functools.partial(jitted, value=1.0), 3
    population = jax.tree.map(lambda x: jnp.stack([x] * members), PARAMS)
    states = jax.vmap(tx.init)(population)
    alone = [(PARAMS, tx.init(PARAMS)) for _ in range(members)]
    # Each member has seen another number of microbatches when they are stacked.
    for member in range(members):
        for i in range(member):
            params, state = alone[member]
            alone[member] = run(_gradients(i), state, params)
    population, states = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    together = jax.jit(
        jax.vmap(functools.partial(apply_gradients, tx, value=1.0), in_axes=(None, 0, 0))
    )
    released = []
    for i in range(MICROBATCHES):
        population, states = together(_gradients(i), states, population)
        released.append(np.asarray(get_state(states).released).tolist())
        alone = [run(_gradients(i), state, params) for params, state in alone]
    together_alone = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    _assert_close((population, states), together_alone)
    if factory is FACTORIES["adamw"]:
        assert [False, False, True] in released
        assert [True, False, False] in released


# Optax itself cannot initialise the last two from shapes.
@pytest.mark.parametrize("factory", list(FACTORIES.values())[:-2], ids=list(FACTORIES)[:-2])
def test_init_takes_shapes_and_placeholders(factory):
    tx = factory()
    state = tx.init(PARAMS)
    from_shapes = tx.init(jax.eval_shape(lambda: PARAMS))
    assert _types(from_shapes) == _types(state)
    assert _types(jax.eval_shape(tx.init, PARAMS)) == _types(state)
    marked = optax.tree.map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: "other"
    )
    sums = get_state(marked).grad_sum
    assert sums == (() if factory is FACTORIES["one"] else dict.fromkeys(PARAMS, "param"))
    assert get_state(marked).mini_step == "other"


def test_optax_tree_finds_and_sets_the_state():
    tx = optax.chain(optax.clip(1.0), accumulate(4, optax.adam(0.1)))
    state = tx.init(PARAMS)
    assert optax.tree.get(state, "AccumulateState") is get_state(state)
    assert optax.tree.get(state, "mini_step") == 0
    state = optax.tree.set(state, mini_step=jnp.int32(3))
    _, state = tx.update(_gradients(0), state, PARAMS)
    assert get_state(state).released


def test_is_an_optax_transformation():
    tx = accumulate(4, optax.adam(0.1))
    init, update = tx
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert (init, update) == (tx.init, tx.update)
    assert optax.with_extra_args_support(tx) is tx


@every_step
def test_none_and_masked_leaves_pass_through(step):
    params = {"a": jnp.ones(2), "none": None, "masked": optax.MaskedNode()}
    tx = accumulate(2, optax.sgd(1.0))
    state = tx.init(params)
    run = jax.jit(functools.partial(step, tx))
    new = params
    for _ in range(2):
        new, state = run(params, state, new)
    assert new["none"] is None
    assert new["masked"] == optax.MaskedNode()
    np.testing.assert_array_equal(new["a"], np.zeros(2))
    assert step(tx, None, tx.init(None), None)[0] is None  # nothing is trained


@every_step
def test_filtered_trees_of_equinox_train_as_on_the_full_batch(step):
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    x = jnp.linspace(-1, 1, 16).reshape(4, 2, 2)
    tx, full = accumulate(4, optax.adam(0.1)), optax.adam(0.1)

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    def train(tx, batches):
        arrays, static = eqx.partition(model, eqx.is_array)
        state = tx.init(arrays)

        @eqx.filter_jit
        def train_step(arrays, state, batch):
            grads = eqx.filter_grad(loss)(eqx.combine(arrays, static), batch)
            return step(tx, grads, state, arrays)

        for batch in batches:
            arrays, state = train_step(arrays, state, batch)
        return arrays

    _assert_close(train(tx, x), train(full, [x.reshape(8, 2)]))


@pytest.mark.filterwarnings("ignore:`accumulate` stands in front:UserWarning")
@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.1),
        optax.chain(accumulate(2), optax.adam(0.1)),
        optax.chain(accumulate(2), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
        optax.chain(optax.clip(1.0), optax.chain(optax.scale(2.0), accumulate(2, optax.adam(0.1)))),
        optax.apply_if_finite(accumulate(2, optax.adam(0.1)), 2),
        optax.MultiSteps(optax.adam(0.1), 2),
    ],
)
def test_apply_gradients_is_update_then_apply_updates_for_any_transformation(tx):
    runs = [jax.jit(functools.partial(step, tx)) for step in (update_and_apply, apply_gradients)]
    results = [(PARAMS, tx.init(PARAMS)) for _ in runs]
    for i in range(4):
        results = [
            run(_gradients(i), state, params)
            for run, (params, state) in zip(runs, results, strict=True)
        ]
        _assert_close(*results)
