"""`value_and_apply` computes what `jax.value_and_grad` and `apply_gradients` do, in less memory."""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest

from optaccum import (
    accumulate,
    apply_gradients,
    get_state,
    value_and_apply,
    window_metrics,
)

LAYERS, WIDTH, ROWS = 4, 8, 6
PARAMS = {
    "table": jax.random.normal(jax.random.key(0), (10, WIDTH)),
    "layers": {
        "a": jax.random.normal(jax.random.key(1), (LAYERS, WIDTH, 16)) * 0.3,
        "b": jax.random.normal(jax.random.key(2), (LAYERS, 16, WIDTH)) * 0.3,
    },
    "scale": jnp.ones(WIDTH, jnp.bfloat16),
}
BATCHES = jax.random.randint(jax.random.key(3), (7, ROWS), 0, 10)
WEIGHTS = jnp.array([3.0, 1.0, 0.0, 5.0, 2.0, 2.0, 1.0])


def loss_fn(params, ids):
    def layer(h, w):
        return h + jnp.tanh(h @ w["a"]) @ w["b"], None

    h = lax.scan(jax.checkpoint(layer), params["table"][ids], params["layers"])[0]
    return jnp.mean((h * params["scale"]) ** 2)


def in_two_calls(tx, fun, *, names=()):
    def step(params, opt_state, *args, **extra_args):
        loss, grads = jax.value_and_grad(fun)(params, *args)
        extra_args |= dict.fromkeys(names, loss)
        return loss, *apply_gradients(tx, grads, opt_state, params, **extra_args)

    return step


def train(step, tx, weights=None, releases=None):
    """Runs all microbatches; returns the losses, the parameters and the state."""
    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state, losses = tx.init(params), []
    for i, ids in enumerate(BATCHES):
        extra_args: dict[str, Any] = {} if weights is None else {"weight": weights[i]}
        if releases is not None:
            extra_args["release"] = releases[i]
        loss, params, state = step(params, state, ids, **extra_args)
        losses.append(loss)
    return losses, params, state


def assert_same(found, expected, rtol=0.0):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=rtol
        )


OPTIONS = {
    "plain": {},
    "sums of gradients": {"use_grad_mean": False},
    "sums of losses": {"loss_reduction": "sum"},
    "narrow sums": {"accumulator_dtype": jnp.bfloat16},
    "skipped": {"should_skip_update_fn": optax.skip_not_finite},
    "metrics": {"metrics": ("value",)},
    "averages": {"average_args": ("value",)},
}


CASES = [(name, 3, WEIGHTS) for name in ("plain", "skipped", "averages")]
CASES += [("plain", 3, None), ("metrics", 1, WEIGHTS)]
OTHERS = ("sums of gradients", "sums of losses", "narrow sums", "metrics")
OTHERS = [*((name, 3, WEIGHTS) for name in OTHERS), ("averages", 1, None)]


@pytest.mark.parametrize(
    ("name", "every_k", "weights"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_it_computes_what_the_two_calls_do(name, every_k, weights):
    tx = accumulate(every_k, optax.adamw(1e-2), **OPTIONS[name])
    names = ("value",) if name in ("metrics", "averages") else ()
    found = train(value_and_apply(tx, loss_fn), tx, weights)
    expected = train(in_two_calls(tx, loss_fn, names=names), tx, weights)
    # Rows of a lookup are weighed before they are added up; Adam divides what they differ by.
    assert_same(
        found, expected, 0.0 if weights is None else 2e-5 if name != "narrow sums" else 0.02
    )


def test_the_caller_may_decide_about_releases():
    releases = jnp.array([False, True, False, False, True, True, False])
    tx = accumulate(3, optax.adam(1e-2))
    found = train(value_and_apply(tx, loss_fn), tx, releases=releases)
    expected = train(in_two_calls(tx, loss_fn), tx, releases=releases)
    assert_same(found, expected)
    assert get_state(found[2]).gradient_step == 3


@pytest.mark.parametrize("release", [False, True])
def test_a_release_that_is_known_leaves_no_conditional(release):
    tx = accumulate(3, optax.adam(1e-2))
    step = functools.partial(value_and_apply(tx, loss_fn), release=release)
    text = jax.jit(step).lower(PARAMS, tx.init(PARAMS), BATCHES[0]).as_text()
    assert "stablehlo.case" not in text
    assert "stablehlo.if" not in text


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(1e-2),
        optax.chain(optax.clip(0.1), accumulate(3, optax.adam(1e-2))),
        optax.polyak_sgd(),
        accumulate(3, optax.polyak_sgd(), average_args=("value",)),
    ],
    ids=["adam", "chain", "polyak", "polyak in windows"],
)
def test_any_transformation_will_do(tx):
    found = train(value_and_apply(tx, loss_fn), tx)
    assert_same(found, train(in_two_calls(tx, loss_fn, names=("value",)), tx))


def test_nan_of_weight_zero_adds_nothing():
    def broken(params, ids):
        return loss_fn(params, ids) * jnp.where(jnp.all(ids == BATCHES[2]), jnp.nan, 1.0)

    tx = accumulate(7, optax.adam(1e-2))
    _, params, state = train(value_and_apply(tx, broken), tx, WEIGHTS)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((params, state)))
    _, expected, _ = train(in_two_calls(tx, broken), tx, WEIGHTS)
    assert_same(params, expected, 2e-5)


def test_weights_of_a_function_and_outputs():
    def with_aux(params, ids):
        return loss_fn(params, ids), {"ids": ids}

    tx = accumulate(3, optax.adam(1e-2), metrics=("value",))
    step = value_and_apply(tx, with_aux, has_aux=True, weight_fn=lambda params, ids: jnp.sum(ids))
    (loss, aux), params, state = jax.jit(step)(PARAMS, tx.init(PARAMS), BATCHES[0])
    np.testing.assert_array_equal(aux["ids"], BATCHES[0])
    assert get_state(state).weight == jnp.sum(BATCHES[0])
    np.testing.assert_allclose(window_metrics(state)["value"], loss, rtol=1e-6)
    with pytest.raises(TypeError, match="`weight` was passed beside `weight_fn`"):
        step(params, state, BATCHES[1], weight=2.0)


def test_outside_of_jit_and_in_a_scan():
    tx = accumulate(2, optax.adam(1e-2))
    step = value_and_apply(tx, loss_fn)
    params, state = PARAMS, tx.init(PARAMS)
    for ids in BATCHES[:2]:
        _, params, state = step(params, state, ids)

    def body(carried, ids):
        loss, *carried = step(*carried, ids)
        return tuple(carried), loss

    (scanned, _), _ = jax.jit(lambda p, s: lax.scan(body, (p, s), BATCHES[:2]))(
        PARAMS, tx.init(PARAMS)
    )
    assert_same(scanned, params, 1e-5)


def test_in_shard_map_it_reduces_in_the_release_alone():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    tx = accumulate(3, optax.adam(1e-2), reduce_axes="data")
    step = value_and_apply(tx, loss_fn)

    def program(batches, release):
        params, state = PARAMS, tx.init(PARAMS)
        for ids in batches:
            _, params, state = step(params, state, ids, release=release)
        return params if release is None else get_state(state).grad_sum

    def mapped(release, out):
        fun = functools.partial(program, release=release)
        return jax.jit(jax.shard_map(fun, mesh=mesh, in_specs=P(None, "data"), out_specs=out))

    found = mapped(None, P())(BATCHES[:3])
    whole = accumulate(3, optax.adam(1e-2))
    params, state = PARAMS, whole.init(PARAMS)
    for ids in BATCHES[:3]:
        _, params, state = in_two_calls(whole, loss_fn)(params, state, ids)
    assert_same(found, params, 2e-4)  # bfloat16 in `scale`, whose Adam steps are 0.01
    assert "all_reduce" in mapped(True, P("data")).lower(BATCHES[:3]).as_text()
    assert "all_reduce" not in mapped(False, P("data")).lower(BATCHES[:3]).as_text()


def test_lookahead_trains_its_fast_parameters():
    tx = accumulate(2, optax.lookahead(optax.sgd(0.1), 2, 0.5))
    params = optax.LookaheadParams.init_synced(PARAMS)
    found, expected = (params, tx.init(params)), (params, tx.init(params))
    step, gradient = jax.jit(value_and_apply(tx, loss_fn)), jax.jit(jax.grad(loss_fn))
    for ids in BATCHES:
        found = step(*found, ids)[1:]
        grads = gradient(expected[0].fast, ids)
        expected = apply_gradients(tx, grads, *reversed(expected))
    assert_same(found, expected, 1e-5)


def test_an_open_window_may_be_closed_by_every_k_1():
    four, one = accumulate(4, optax.sgd(0.1)), accumulate(1, optax.sgd(0.1))
    found = expected = PARAMS, four.init(PARAMS)
    for tx in (four, four, one):
        _, *found = jax.jit(value_and_apply(tx, loss_fn))(*found, BATCHES[0])
        _, *expected = jax.jit(in_two_calls(tx, loss_fn))(*expected, BATCHES[0])
    assert_same(found, expected)
    assert get_state(found[1]).gradient_step == 1


def test_a_parameter_may_have_no_gradient_in_a_microbatch():
    tx = accumulate(2, optax.sgd(0.1))
    start = {"a": jnp.float32(1.0), "b": jnp.float32(1.0)}
    found = expected = start, tx.init(start)

    def both(p):
        return (p["a"] - 3) ** 2 + p["b"]

    def one(p):
        return (p["a"] - 3) ** 2

    _, *found = jax.jit(value_and_apply(tx, both))(*found)
    _, *expected = jax.jit(in_two_calls(tx, both))(*expected)
    found[0]["b"] = expected[0]["b"] = None
    loss, *found = jax.jit(value_and_apply(tx, one))(*found)
    wanted, *expected = jax.jit(in_two_calls(tx, one))(*expected)
    assert loss == wanted == 4.0
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_same(found, expected)


class Rebuilt:
    """A pytree that can be rebuilt from arrays alone."""

    def __init__(self, x):
        self.x = jnp.asarray(x)


jax.tree_util.register_pytree_node(Rebuilt, lambda r: ((r.x,), None), lambda _, xs: Rebuilt(*xs))


def test_outputs_may_be_of_any_kind():
    def with_aux(params, ids):
        return loss_fn(params, ids), {"name": "a", "kept": Rebuilt(ids)}

    tx = accumulate(3, optax.adam(1e-2))
    step = value_and_apply(tx, with_aux, has_aux=True)

    @jax.jit
    def call(params, state, ids):
        (loss, aux), *rest = step(params, state, ids)
        assert aux["name"] == "a"
        return loss, aux["kept"].x, rest

    np.testing.assert_array_equal(call(PARAMS, tx.init(PARAMS), BATCHES[0])[1], BATCHES[0])


@pytest.mark.parametrize("every_k", [1, 3])
def test_a_loss_that_is_reduced_already_is_refused(every_k):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def program(ids):
        tx = accumulate(every_k, optax.sgd(1.0), reduce_axes="data")
        step = value_and_apply(tx, lambda p, ids: lax.pmean(loss_fn(p, ids), "data"))
        return step(PARAMS, tx.init(PARAMS), ids)[1]

    with pytest.raises(TypeError, match="returned a loss that does not vary over"):
        jax.jit(program)(BATCHES[0])


def test_mistakes_are_named():
    tx = accumulate(3, optax.adam(1e-2))
    with pytest.raises(TypeError, match=r"`tx` must be an optax.GradientTransformation"):
        value_and_apply(loss_fn, tx)
    with pytest.raises(TypeError, match="`fun` must be a function"):
        value_and_apply(tx, 3)
    with pytest.raises(TypeError, match="`has_aux` must be True or False"):
        value_and_apply(tx, loss_fn, 1)
    step = jax.jit(value_and_apply(tx, loss_fn))
    with pytest.raises(TypeError, match="must be the AccumulateState that `init` returns"):
        step(PARAMS, optax.adam(1e-2).init(PARAMS), BATCHES[0])
    other = {**PARAMS, "table": jnp.ones((12, WIDTH))}
    with pytest.raises(ValueError, match=r"\['table'\] has shape \(12, 8\)"):
        step(other, tx.init(PARAMS), BATCHES[0])


def test_a_hold_needs_no_tree_of_gradients():
    params = {
        "table": jnp.ones((4, 64)),
        "layers": {"a": jnp.ones((8, 64, 256)), "b": jnp.ones((8, 256, 64))},
        "scale": jnp.ones(64),
    }
    tx = accumulate(3, optax.adam(1e-2))

    def temporaries(step):
        step = jax.jit(functools.partial(step, release=False), donate_argnums=(0, 1))
        compiled: Any = step.lower(params, tx.init(params), jnp.zeros(4, jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert (
        temporaries(value_and_apply(tx, loss_fn))
        < temporaries(in_two_calls(tx, loss_fn)) - size / 2
    )


@pytest.mark.parametrize("named", [True, False])
def test_an_inner_optimizer_gets_the_loss_if_its_signature_names_it(named):
    def with_value(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: u * value, updates), state

    def without(updates, state, params=None, **extra_args):
        assert "value" not in extra_args
        return updates, state

    update = with_value if named else without
    tx = accumulate(1, optax.GradientTransformationExtraArgs(optax.init_empty_state, update))
    step = jax.jit(value_and_apply(tx, lambda w, x: jnp.sum(w * x)))
    loss, w, _ = step(jnp.ones(2), tx.init(jnp.ones(2)), jnp.array([1.0, 2.0]))
    factor = float(loss) if named else 1.0
    np.testing.assert_array_equal(w, 1 + factor * np.array([1.0, 2.0]))
