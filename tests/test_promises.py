"""The promises of docs/semantics.md and of the docstrings, each with numbers by hand.

The id of a test is the promise: a row of a table of cases, or one of the *Guarantees*. Promises
about several devices are kept by test_reduce_axes.py and test_devices.py, those about temporaries
by test_lowering.py, and refusals by test_validate.py and test_rows.py.
"""

import functools
import re

from helpers import hlo
from helpers.steps import STEPS, every_step, recording
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optaccum
from optaccum import accumulate, apply_gradients

NAN, INF = float("nan"), float("inf")
# Parameters begin at zero and a release subtracts the gradient, so they show every release; the
# second link counts how often the inner optimizer runs.
SGD = optax.chain(optax.sgd(1.0), recording())

TWO = accumulate(2, SGD)  # one transformation, so that it is traced once for all rows


def skipping(k):
    return accumulate(k, SGD, should_skip_update_fn=optax.skip_not_finite)


# What a trace knows and what it does not; test_window.py has all kinds of weights.
KINDS = (float, jnp.float32)

# Each row is one call: the gradient and the extra arguments; then, after it, the parameter,
# `mini_step`, `gradient_step` and `skipped`. A transformation takes over the state from the one
# before it.
WINDOWS = {
    "the window closes at `mini_step >= every_k`, and `inner` gets the mean": (
        TWO,
        (1.0, {}, 0.0, 1, 0, 0),
        (3.0, {}, -2.0, 0, 1, 0),
        (5.0, {}, -2.0, 1, 1, 0),
        (6.0, {}, -7.5, 0, 2, 0),
    ),
    "`inner` gets the weighted mean": (
        TWO,
        (2.0, {"weight": 1.0}, 0.0, 1, 0, 0),
        (6.0, {"weight": 3.0}, -5.0, 0, 1, 0),
    ),
    "`use_grad_mean=False`: `inner` gets the weighted sum": (
        accumulate(2, SGD, use_grad_mean=False),
        (2.0, {"weight": 1.0}, 0.0, 1, 0, 0),
        (6.0, {"weight": 3.0}, -20.0, 0, 1, 0),
    ),
    "`every_k` is a function of `gradient_step`": (
        accumulate(lambda step: 1 + step, SGD),
        (1.0, {}, -1.0, 0, 1, 0),
        (2.0, {}, -1.0, 1, 1, 0),
        (4.0, {}, -4.0, 0, 2, 0),
        (1.0, {}, -4.0, 1, 2, 0),
    ),
    "nothing of one window, a NaN included, reaches the next": (
        accumulate(2, optax.chain(optax.zero_nans(), SGD)),
        (NAN, {}, 0.0, 1, 0, 0),
        (3.0, {}, 0.0, 0, 1, 0),
        (1.0, {}, 0.0, 1, 1, 0),
        (3.0, {}, -2.0, 0, 2, 0),
    ),
    "`every_k` the constant 1: `inner` in every call": (
        accumulate(1, SGD),
        (1.0, {}, -1.0, 0, 1, 0),
        (2.0, {"weight": 5.0}, -3.0, 0, 2, 0),
        (2.0, {"weight": 0.0}, -3.0, 0, 2, 0),
        (2.0, {}, -5.0, 0, 3, 0),
    ),
    "`every_k` shrinks below an open `mini_step`: the next microbatch closes the window": (
        accumulate(4, SGD),
        (1.0, {}, 0.0, 1, 0, 0),
        (2.0, {}, 0.0, 2, 0, 0),
        (3.0, {}, 0.0, 3, 0, 0),
        TWO,
        (6.0, {}, -3.0, 0, 1, 0),
        (5.0, {}, -3.0, 1, 1, 0),
        (7.0, {}, -9.0, 0, 2, 0),
    ),
    "`every_k` shrinks: the next *accepted* microbatch closes the window": (
        skipping(4),
        (1.0, {}, 0.0, 1, 0, 0),
        (3.0, {}, 0.0, 2, 0, 0),
        skipping(2),
        (NAN, {}, 0.0, 2, 0, 1),
        (8.0, {}, -4.0, 0, 1, 1),
    ),
    "`every_k` shrinks to the constant 1: a state with sums keeps them": (
        accumulate(4, SGD),
        (1.0, {}, 0.0, 1, 0, 0),
        (3.0, {}, 0.0, 2, 0, 0),
        accumulate(1, SGD),
        (8.0, {}, -4.0, 0, 1, 0),
        (2.0, {}, -6.0, 0, 2, 0),
    ),
    "`every_k`, traced, is below 1: as 1": (
        accumulate(lambda step: jnp.int32(-3) + step, SGD),
        (1.0, {}, -1.0, 0, 1, 0),
        (2.0, {}, -3.0, 0, 2, 0),
    ),
    "`release=True` closes the window, divided by what it holds": (
        accumulate(4, SGD),
        (1.0, {"release": False}, 0.0, 1, 0, 0),
        (2.0, {"release": False}, 0.0, 2, 0, 0),
        (6.0, {"release": True}, -3.0, 0, 1, 0),
        (5.0, {"release": True}, -8.0, 0, 2, 0),
    ),
    "`release=False` keeps the window open, however many it holds": (
        TWO,
        (1.0, {"release": False}, 0.0, 1, 0, 0),
        (2.0, {"release": False}, 0.0, 2, 0, 0),
        (3.0, {"release": False}, 0.0, 3, 0, 0),
        (6.0, {}, -3.0, 0, 1, 0),
    ),
    **{
        f"`weight` 0 adds nothing, not even {poison}, but is counted": (
            accumulate(3, SGD),
            (poison, {"weight": 0.0}, 0.0, 1, 0, 0),
            (2.0, {"weight": 1.0}, 0.0, 2, 0, 0),
            (4.0, {"weight": 3.0}, -3.5, 0, 1, 0),
            (2.0, {"weight": 1.0}, -3.5, 1, 1, 0),
            (4.0, {"weight": 3.0}, -3.5, 2, 1, 0),
            (poison, {"weight": 0.0}, -7.0, 0, 2, 0),
        )
        for poison in (NAN, INF)
    },
    "weights of the window sum to 0: dropped when it closes": (
        TWO,
        (5.0, {"weight": 0.0}, 0.0, 1, 0, 0),
        (NAN, {"weight": 0.0}, 0.0, 0, 0, 0),
        (5.0, {"weight": 2.0}, 0.0, 1, 0, 0),
        (7.0, {"weight": 2.0}, -6.0, 0, 1, 0),
    ),
    "weights of the window sum to 0: dropped where `release` closes it, too": (
        accumulate(8, SGD),
        (5.0, {"weight": 0.0, "release": False}, 0.0, 1, 0, 0),
        (NAN, {"weight": 0.0, "release": True}, 0.0, 0, 0, 0),
        (5.0, {"weight": 2.0, "release": True}, -5.0, 0, 1, 0),
    ),
    **{
        f"`weight` {weight}, {kind.__name__}: the microbatch is rejected": (
            TWO,
            (2.0, {"weight": 1.0}, 0.0, 1, 0, 0),
            (9.0, {"weight": kind(weight)}, 0.0, 1, 0, 1),
            (4.0, {"weight": 3.0}, -3.5, 0, 1, 1),
        )
        for weight in (-1.0, -1e-30, NAN, INF, -INF, 3e38)
        for kind in KINDS
    },
    **{
        f"`weight` {weight}, {kind.__name__}: below 2**-100 is 0": (
            TWO,
            (9.0, {"weight": kind(weight)}, 0.0, 1, 0, 0),
            (NAN, {"weight": kind(weight)}, 0.0, 0, 0, 0),
            (9.0, {"weight": kind(weight)}, 0.0, 1, 0, 0),
            (4.0, {"weight": kind(2.0**-100)}, -4.0, 0, 1, 0),
        )
        for weight in (1e-33, 2.0**-101, 1e-40, 1e-300)
        for kind in KINDS
    },
    **{
        f"weights, {kind.__name__}, whose sum would be above 2**126: the microbatch is rejected": (
            TWO,
            (2.0, {"weight": kind(2.0**125)}, 0.0, 1, 0, 0),
            (9.0, {"weight": kind(2.0**126)}, 0.0, 1, 0, 1),
            (3.0, {"weight": kind(2.0**125)}, -2.5, 0, 1, 1),
            (2.0, {"weight": kind(2.0**126)}, -2.5, 1, 1, 1),
            (9.0, {"weight": kind(2.0**120)}, -2.5, 1, 1, 2),
            (2.0, {"weight": kind(1.0)}, -4.5, 0, 2, 2),
        )
        for kind in KINDS
    },
    "`should_skip_update_fn` says skip: the microbatch is rejected": (
        skipping(3),
        (NAN, {}, 0.0, 0, 0, 1),
        (1.0, {}, 0.0, 1, 0, 1),
        (INF, {}, 0.0, 1, 0, 2),
        (2.0, {}, 0.0, 2, 0, 2),
        (6.0, {}, -3.0, 0, 1, 2),
        (NAN, {}, -3.0, 0, 1, 3),
    ),
    "rejected: nothing is released, `release=True` too": (
        skipping(4),
        (2.0, {"release": False}, 0.0, 1, 0, 0),
        (NAN, {"release": True}, 0.0, 1, 0, 1),
        (4.0, {"release": True}, -3.0, 0, 1, 1),
    ),
    "rejected at `every_k` 1: nothing is released": (
        skipping(1),
        (2.0, {}, -2.0, 0, 1, 0),
        (NAN, {}, -2.0, 0, 1, 1),
        (3.0, {"weight": jnp.float32(-1)}, -2.0, 0, 1, 2),
        (1.0, {}, -3.0, 0, 2, 2),
    ),
}


def leaves(a, *b):
    """Returns a gradient, or parameters, of one number, or of one for each of two leaves."""
    (b,) = b or (a,)
    return {"a": jnp.full(2, a), "b": None if b is None else jnp.asarray(b, jnp.float32)}


def inner_calls(state):
    return int(optax.tree.get(state.inner_state, "RecordingState").count)


JITTED = {name: jax.jit(step, static_argnums=0) for name, step in STEPS.items()}
# The programs of both ways are compiled on one version.
WAYS = {
    "update-eager": (STEPS["update"], False),
    "apply_gradients-eager": (STEPS["apply_gradients"], False),
    "apply_gradients-jit": pytest.param(JITTED["apply_gradients"], True, marks=pytest.mark.slow),
    "update-jit": pytest.param(JITTED["update"], True, marks=pytest.mark.slow),
}


@pytest.mark.parametrize(("run", "traced"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("rows", WINDOWS.values(), ids=WINDOWS)
def test_window(rows, run, traced):
    tx, *rows = rows
    params, before = leaves(0.0), 0
    state = tx.init(params)
    for row in rows:
        if isinstance(row, optax.GradientTransformation):
            tx = row
            continue
        gradient, extra_args, expected, mini_step, gradient_step, skipped = row
        if traced:
            extra_args = {name: jnp.asarray(value) for name, value in extra_args.items()}
        params, state = run(tx, leaves(gradient), state, params, **extra_args)
        jax.tree.map(np.testing.assert_array_equal, params, leaves(expected))
        counters = state.mini_step, state.gradient_step, state.skipped
        assert [*map(int, counters)] == [mini_step, gradient_step, skipped]
        assert bool(optaccum.has_released(state)) == (gradient_step > before)
        assert inner_calls(state) == gradient_step, "`inner` ran on a hold"
        before = gradient_step


def test_rejected_leaves_the_window_as_it_was_bit_for_bit():
    tx = accumulate(
        3,
        optax.adam(1.0),
        should_skip_update_fn=optax.skip_not_finite,
        average_args=("value",),
    )
    params = leaves(0.5)
    before = tx.init(params)
    for g in (1.0, 2.0, 3.0, 4.0):
        _, before = tx.update(leaves(g), before, params, value=g)
    _, after = tx.update(leaves(NAN), before, params, value=NAN)
    assert (int(after.skipped), bool(after.released)) == (1, False)
    unchanged = {"skipped": before.skipped, "skip_state": before.skip_state}
    jax.tree.map(np.testing.assert_array_equal, after._replace(**unchanged), before)


@every_step
def test_a_dropped_window_leaves_inner_untouched(step):
    """Adam's moments and its count too, and the next window is what a first one would have been."""
    tx, params = accumulate(2, optax.adam(1.0)), leaves(1.0)
    state = tx.init(params)
    kept, dropped = params, state
    for g in (5.0, NAN):
        kept, dropped = step(tx, leaves(g), dropped, kept, weight=0.0)
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    jax.tree.map(np.testing.assert_array_equal, dropped.inner_state, state.inner_state)
    for g in (5.0, 7.0):
        kept, dropped = step(tx, leaves(g), dropped, kept, weight=2.0)
        params, state = step(tx, leaves(g), state, params, weight=2.0)
    jax.tree.map(np.testing.assert_array_equal, (kept, dropped), (params, state))
    assert float(kept["b"]) == pytest.approx(0.0, abs=1e-4)  # a first step of Adam is 1.0


@every_step
def test_averaged_arguments_of_rejected_and_weightless_microbatches_do_not_count(step):
    """A NaN loss comes with a NaN gradient, and must go with it."""
    tx = accumulate(
        3, recording(), should_skip_update_fn=optax.skip_not_finite, average_args=("value",)
    )
    params = leaves(0.0)
    state = tx.init(params)
    for g, value, weight in ((1.0, 2.0, 1), (NAN, NAN, 1), (1.0, 4.0, 1), (1.0, NAN, 0)):
        params, state = step(tx, leaves(g), state, params, value=value, weight=weight)
    assert float(state.inner_state.value) == 3


TASKS = {"trunk": jnp.zeros(2), "a": jnp.zeros(3), "b": {"w": jnp.zeros(2), "steps": None}}


def of_task(name, value):
    """Returns the gradient of one of two decoders that share a trunk."""
    leaf = {"a": jnp.full(3, value), "b": {"w": jnp.full(2, value), "steps": None}}[name]
    return {"trunk": jnp.full(2, value), "a": None, "b": None} | {name: leaf}


@every_step
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("last", ["a", "b"])
def test_what_others_added_to_a_leaf_that_is_none_when_the_window_closes_reaches_inner(
    step, jitted, last
):
    calls = [(1.0, "a"), (2.0, "b"), (6.0, "b" if last == "b" else "a")]
    tx = accumulate(3, optax.chain(optax.trace(0.5), SGD))
    run = jax.jit(functools.partial(step, tx)) if jitted else functools.partial(step, tx)
    params, state = TASKS, tx.init(TASKS)
    for value, task in calls:
        params, state = run(of_task(task, value), state, params)
    microbatches = [
        reference.Microbatch(
            [
                None if g is None else np.asarray(g)
                for g in (grads["a"], (grads["b"] or {}).get("w"))
            ]
        )
        for grads in (of_task(task, value) for value, task in calls)
    ]
    expected = reference.simulate(microbatches, 3)[-1].gradient
    for found, g in zip((params["a"], params["b"]["w"]), expected, strict=True):
        np.testing.assert_allclose(-found, g, rtol=1e-7)
    np.testing.assert_allclose(params["trunk"], [-3, -3])


@pytest.mark.parametrize("inner", [optax.adamw(0.1), optax.sgd(0.1)], ids=["adamw", "sgd"])
def test_a_leaf_without_a_gradient_in_the_whole_window_has_a_mean_of_zeros(inner):
    tx, found = accumulate(2, inner), []
    for grads in ({"a": jnp.ones(2), "b": None}, {"a": jnp.ones(2), "b": jnp.zeros(2)}):
        params = {"a": jnp.ones(2), "b": jnp.ones(2)}
        state = tx.init(params)
        for _ in range(2):
            params, state = apply_gradients(tx, grads, state, params)
        found.append((params, state))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_none_stays_without_a_sum_and_at_every_k_1():
    seen = []

    def update(updates, state, params=None, *, grad, **_):
        seen.append((updates, grad))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    params = {"a": jnp.ones(2), "frozen": None, "steps": jnp.arange(2), "number": 0.5}
    none = {"a": jnp.ones(2), "frozen": None, "steps": None, "number": None}
    for k in (2, 1):
        tx = accumulate(k, inner, average_args=("grad",))
        state, new = tx.init(params), params
        for _ in range(k):
            new, state = apply_gradients(tx, none, state, new, grad=none)
        for given in seen[-1]:
            assert (given["frozen"], given["steps"]) == (None, None)
            assert (given["number"] is None) == (k == 1)
        np.testing.assert_array_equal(new["a"], [2.0, 2.0])
        assert new["frozen"] is None
        assert new["number"] is params["number"]  # no array: it cannot be trained
        np.testing.assert_array_equal(new["steps"], params["steps"])


@pytest.mark.parametrize("before", [7.0, NAN])
def test_a_none_gradient_adds_nothing_of_the_window_before_either(before):
    tx, params = accumulate(2, optax.sgd(1.0)), leaves(0.0)
    state = tx.init(params)
    for b in (before, before):
        _, state = apply_gradients(tx, leaves(1.0, b), state, params)
    for b in (None, 1.0):
        params, state = apply_gradients(tx, leaves(1.0, b), state, params)
    jax.tree.map(np.testing.assert_array_equal, params, leaves(-1.0, -0.5))


# Dtypes and shapes.


@pytest.mark.parametrize(
    ("parameter", "gradient", "asked", "sums"),
    [
        pytest.param(jnp.bfloat16, jnp.bfloat16, None, jnp.float32, id="promoted to float32"),
        pytest.param(jnp.float32, jnp.bfloat16, None, jnp.float32, id="the parameter's dtype"),
        pytest.param(jnp.complex64, jnp.complex64, None, jnp.complex64, id="complex stays"),
        pytest.param(
            jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16, id="`accumulator_dtype`"
        ),
    ],
)
def test_sums_are_kept_in_their_dtype_and_what_inner_gets_in_the_gradients(
    parameter, gradient, asked, sums
):
    seen = []

    def update(updates, state, params=None):
        seen.append(updates.dtype)
        return updates, state

    inner = optax.GradientTransformation(optax.init_empty_state, update)
    tx = accumulate(2, inner, accumulator_dtype=asked)
    params = jnp.zeros(3, parameter)
    state = tx.init(params)
    for g in (1.0, 3.0):
        updates, state = tx.update(jnp.full(3, g, gradient), state, params)
        assert state.grad_sum.dtype == sums
    assert set(seen) == {jnp.dtype(gradient)}
    assert updates.dtype == gradient
    np.testing.assert_array_equal(np.asarray(updates, np.complex64), np.full(3, 2))


def test_updates_of_a_hold_are_exact_zeros_of_the_shapes_and_dtypes_of_a_release():
    inner = optax.chain(optax.scale(-0.5), optax.stateless(lambda u, _: u | {"more": u["b"] + 1}))
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(4)}
    tx = accumulate(2, inner)
    held, state = tx.update(params, tx.init(params), params)
    released, _ = tx.update(params, state, params)
    types = {"a": ((2, 3), jnp.bfloat16), "b": ((4,), jnp.float32), "more": ((4,), jnp.float32)}
    for updates, b in ((held, 0.0), (released, -0.5)):
        assert {name: (u.shape, u.dtype) for name, u in updates.items()} == types
        np.testing.assert_array_equal(updates["b"], np.full(4, b))
        np.testing.assert_array_equal(updates["more"], np.full(4, b + 1 if b else 0.0))


def test_state_leaves_keep_the_dtype_that_init_gave_them_and_scan_can_carry_them():
    """This inner optimizer returns its numbers in float32."""

    def update(updates, state, params=None):
        return updates, {
            "count": state["count"] + jnp.int8(1),
            "low": state["low"] + jnp.float32(1),
        }

    inner = optax.GradientTransformation(
        lambda params: {"count": jnp.int32(0), "low": jnp.bfloat16(0)}, update
    )
    tx = accumulate(2, inner)

    def body(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    state, updates = jax.lax.scan(body, tx.init(jnp.zeros(2)), jnp.ones((4, 2)))
    assert {name: x.dtype for name, x in state.inner_state.items()} == {
        "count": jnp.int32,
        "low": jnp.bfloat16,
    }
    assert (int(state.inner_state["count"]), float(state.inner_state["low"])) == (2, 2)
    np.testing.assert_array_equal(updates[:, 0], [0, 1, 0, 1])


@every_step
def test_under_vmap_the_result_of_inner_is_kept_for_those_that_release(step):
    tx = accumulate(2, SGD)
    params = jnp.zeros((3, 2))
    state = jax.vmap(tx.init)(params)
    state = state._replace(mini_step=jnp.array([0, 1, 0]), weight=jnp.array([0.0, 1.0, 0.0]))
    params, state = jax.vmap(functools.partial(step, tx))(
        jnp.array([[1.0, 1.0], [4.0, 4.0], [NAN, NAN]]), state, params
    )
    np.testing.assert_array_equal(params, [[0, 0], [-2, -2], [0, 0]])
    np.testing.assert_array_equal(state.inner_state[1].count, [0, 1, 0])


# What is compiled.

LARGE = {f"w{i}": jnp.full((64, 64), 0.1 * (i + 1)) for i in range(4)}


def primitives(tx, step, **extra_args):
    """Returns the names of all primitives of a step, those of sub-programs included."""
    run = functools.partial(step, tx, **extra_args)
    text = str(jax.make_jaxpr(run)(LARGE, tx.init(LARGE), LARGE))
    return set(re.findall(r"\b([a-z_0-9]+)\[", text))


@every_step
@pytest.mark.parametrize("weight", [None, jnp.float32(2)], ids=["counted", "weighted"])
@pytest.mark.parametrize("skip", [None, optax.skip_not_finite], ids=["all", "skip"])
def test_every_k_1_compiles_no_conditional_and_keeps_no_accumulator(step, weight, skip):
    tx = accumulate(1, optax.adamw(0.1), should_skip_update_fn=skip)
    assert "cond" not in primitives(tx, step, weight=weight)
    state, alone = tx.init(LARGE), optax.adamw(0.1).init(LARGE)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (state, alone)]
    assert state.grad_sum == ()
    assert sizes[0] - sizes[1] < 64


@every_step
@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("weight", [None, 2.0, jnp.float32(2)], ids=["counted", "known", "traced"])
@pytest.mark.parametrize("skip", [None, optax.skip_not_finite], ids=["all", "skip"])
def test_a_python_bool_for_release_compiles_no_conditional(step, release, weight, skip):
    tx = accumulate(4, optax.adamw(0.1), should_skip_update_fn=skip)
    assert "cond" not in primitives(tx, step, release=release, weight=weight)
    assert "cond" in primitives(tx, step, weight=weight), "nothing to leave out"


# `value_and_grad`. The loss of a row x at w is w x, so its gradient is the mean of the rows.

ROWS = {"x": jnp.array([1.0, 2.0, 3.0, 9.0])}  # microbatches of two: (1, 3) and (2, 9)
W = jnp.float32(2)


def loss_fn(w, batch):
    return jnp.mean(w * batch["x"])


def loss_fn_with_rest(w, batch, rest):
    return loss_fn(w, batch)


def weigh(first, second):
    """Returns a `weight_fn` for the two microbatches of `ROWS`."""
    return lambda w, batch: jnp.where(batch["x"][0] == 1, first, second)


@pytest.mark.parametrize(
    ("n", "weight_fn", "gradient"),
    [
        pytest.param(2, None, 3.75, id="the mean of the batch"),
        pytest.param(4, None, 3.75, id="the mean of the batch, a row at a time"),
        # 2 (1 + 3) / 2 + 6 (2 + 9) / 2 over 8
        pytest.param(2, weigh(2, 6), 4.625, id="microbatch i holds rows i, i + n, ..."),
        pytest.param(1, None, 3.75, id="`num_microbatches` 1"),
        pytest.param(1, lambda *_: 7, 3.75, id="`num_microbatches` 1, with a weight"),
        pytest.param(2, weigh(3, 0), 2.0, id="weight 0 adds nothing"),
        pytest.param(2, weigh(-1, 3), 5.5, id="a negative weight adds nothing"),
        pytest.param(2, weigh(3, NAN), 2.0, id="a NaN weight adds nothing"),
        pytest.param(2, weigh(INF, 3), 5.5, id="an infinite weight adds nothing"),
        pytest.param(2, weigh(3, 1e-33), 2.0, id="a weight below 2**-100 adds nothing"),
        pytest.param(1, lambda *_: 1e-33, 0.0, id="a weight below 2**-100 alone: zeros"),
        pytest.param(2, lambda *_: -1, 0.0, id="negative weights that are known: zeros"),
        pytest.param(2, weigh(3e38, 3), 5.5, id="a weight above 2**126 adds nothing"),
        pytest.param(2, weigh(2.0**125, 2.0**126), 2.0, id="weights above 2**126 add nothing"),
        pytest.param(2, weigh(0, -1), 0.0, id="weights sum to 0: loss and gradients are zeros"),
        pytest.param(1, lambda *_: 0, 0.0, id="weight 0 of one microbatch: zeros"),
    ],
)
def test_value_and_grad(n, weight_fn, gradient):
    step = optaccum.value_and_grad(loss_fn, num_microbatches=n, weight_fn=weight_fn)
    for run in (step, jax.jit(step)):
        loss, grad = run(W, ROWS)
        assert (float(loss), float(grad)) == (2 * gradient, gradient)
        assert (loss.dtype, grad.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.parametrize(
    ("n", "carried", "stacked"),
    [
        # Means of the rows that count: (1 + 3) / 2, where the NaN weighs nothing.
        pytest.param(2, 10 + 2.0, [2.0, NAN], id="weight 0 leaves the carry, and its aux is kept"),
        pytest.param(1, 10.0, [NAN], id="at `num_microbatches` 1, too"),
    ],
)
def test_a_microbatch_without_weight_adds_no_nan(n, carried, stacked):
    def carrying(w, carry, batch):
        return loss_fn(w, batch), (carry + jnp.mean(batch["x"]), jnp.mean(batch["x"]))

    def weight_fn(w, carry, batch):
        return jnp.where(jnp.isnan(batch["x"]).any(), 0, 2)

    step = optaccum.value_and_grad(
        carrying, 0, True, num_microbatches=n, batch_argnums=2, carry_argnum=1, weight_fn=weight_fn
    )
    batch = {"x": jnp.array([1.0, NAN, 3.0, 9.0])}
    (loss, (carry, aux)), grad = jax.jit(step)(W, 10.0, batch)
    gradient = 2.0 if n == 2 else 0.0
    assert (float(loss), float(grad), float(carry)) == (2 * gradient, gradient, carried)
    np.testing.assert_array_equal(aux, stacked)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_aux_is_stacked_with_a_leading_axis_of_n(n):
    def with_aux(w, batch):
        return loss_fn(w, batch), {"rows": batch["x"], "count": len(batch["x"]), "none": None}

    options = {"has_aux": True, "num_microbatches": n}
    (loss, aux), grad = optaccum.value_and_grad(with_aux, **options)(W, ROWS)
    alone, same = optaccum.grad(with_aux, **options)(W, ROWS)
    assert (float(loss), float(grad), float(alone)) == (7.5, 3.75, 3.75)
    np.testing.assert_array_equal(aux["rows"], same["rows"])
    rows = {1: [[1, 2, 3, 9]], 2: [[1, 3], [2, 9]], 4: [[1], [2], [3], [9]]}
    np.testing.assert_array_equal(aux["rows"], rows[n])
    np.testing.assert_array_equal(aux["count"], [4 // n] * n)
    assert aux["none"] is None
    np.testing.assert_array_equal(aux["rows"].swapaxes(0, 1).reshape(4), ROWS["x"])


@pytest.mark.parametrize(("n", "loops"), [(1, 0), (4, 1)])
def test_num_microbatches_1_is_jax_own_program(n, loops):
    plain = str(jax.make_jaxpr(jax.value_and_grad(loss_fn))(W, ROWS))
    text = str(jax.make_jaxpr(optaccum.value_and_grad(loss_fn, num_microbatches=n))(W, ROWS))
    assert text.count("scan[") == loops
    assert (text == plain) == (n == 1)


def test_num_microbatches_1_has_the_callers_keys_and_others_fold_in_their_number():
    def draw(w, batch, key):
        return loss_fn(w, batch), jax.random.uniform(key)

    key = jax.random.key(7)
    expected = {1: [key], 4: [jax.random.fold_in(key, i) for i in range(4)]}
    for n, keys in expected.items():
        step = optaccum.value_and_grad(draw, has_aux=True, num_microbatches=n, rng_argnums=2)
        for batch in (ROWS, {"x": -ROWS["x"]}):  # keys do not depend on data
            (_, drawn), _ = step(W, batch, key)
            np.testing.assert_array_equal(drawn, [jax.random.uniform(k) for k in keys])
    no_keys = optaccum.value_and_grad(loss_fn_with_rest, num_microbatches=2, rng_argnums=2)
    assert float(no_keys(W, ROWS, {})[1]) == 3.75


@pytest.mark.parametrize("n", [1, 2])
def test_keyword_arguments_go_to_every_microbatch_whole_and_none_leaves_pass_through(n):
    def scaled(params, batch, *, scale, activation):
        assert scale.shape == (3,)
        assert params["none"] is batch["none"] is None
        return jnp.mean(activation(params["w"] * batch["x"])) * scale[2]

    def weight_fn(params, batch, *, scale, activation):
        return scale[0]

    step = optaccum.value_and_grad(scaled, num_microbatches=n, weight_fn=weight_fn)
    options = {"scale": jnp.arange(1.0, 4), "activation": jax.nn.relu}
    loss, grads = step({"w": W, "none": None}, {**ROWS, "none": None}, **options)
    assert float(loss) == 2 * 3.75 * 3
    assert grads == {"w": 3.75 * 3, "none": None}
    assert step.__name__ == "scaled"


@pytest.mark.parametrize("n", [1, 4])
def test_fun_is_traced_once(n):
    calls = []

    def counting(w, batch):
        calls.append(batch["x"].shape)
        return loss_fn(w, batch)

    jax.jit(optaccum.value_and_grad(counting, num_microbatches=n)).lower(W, ROWS)
    assert calls == [(4 // n,)]


def test_a_float32_batch_is_not_copied():
    x = jax.ShapeDtypeStruct((2**12, 8), jnp.float32)
    step = optaccum.value_and_grad(lambda w, x: jnp.mean(jnp.tanh(x * w)), num_microbatches=64)
    compiled = jax.jit(step).lower(W, x).compile()
    # One microbatch, of which there may be a value and a derivative, not a batch of 131 kB.
    assert hlo.temporaries(compiled) <= 4 * 2**12 * 8 * 4 // 64
