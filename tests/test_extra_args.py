"""What an inner optimizer is given beside the gradient stands for the window, or is refused."""

import functools
import itertools
import re

from helpers.meshes import make_mesh, needs_reshard
from helpers.optimizers import reading
from helpers.steps import every_step, update_and_apply
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest

import optaccum
from optaccum import accumulate, apply_gradients, get_state, window_metrics


def takes(*names):
    """Returns an optimizer whose updates are what it was given under these names."""

    def update(updates, state, params=None, **extra_args):
        given = {"updates": updates, **extra_args}
        return {name: given[name] for name in names}, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def release(tx, params, *microbatches):
    """Returns the updates of the last of some microbatches, and the state."""
    state, updates = tx.init(params), None
    for grads, extra_args in microbatches:
        updates, state = jax.jit(tx.update)(grads, state, params, **extra_args)
    return updates, state


# `grad` is the window's, as the updates are.


@pytest.mark.parametrize(
    ("k", "options", "weights", "expected"),
    [
        pytest.param(2, {}, (None, None), 3.0, id="mean"),
        pytest.param(2, {}, (3.0, 1.0), 2.0, id="weighted mean"),
        pytest.param(2, {"use_grad_mean": False}, (3.0, 1.0), 8.0, id="sum"),
        pytest.param(2, {"loss_reduction": "sum"}, (3.0, 1.0), 1.5, id="mean of sums"),
        pytest.param(1, {}, (3.0,), 1.0, id="every_k 1"),
        pytest.param(1, {"loss_reduction": "sum"}, (4.0,), 0.25, id="every_k 1, mean of sums"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grad_is_the_gradient_of_the_window(k, options, weights, expected, dtype):
    tx = accumulate(k, takes("updates", "grad"), **options)
    params = {"w": jnp.zeros(2), "frozen": jnp.arange(3)}
    grads = [{"w": jnp.full(2, g, dtype), "frozen": None} for g in (1.0, 5.0)]
    calls = [
        (g, {"grad": g} | ({} if w is None else {"weight": w}))
        for g, w in zip(grads, weights, strict=False)
    ]
    updates, state = release(tx, params, *calls)
    assert updates["grad"]["w"].dtype == dtype
    np.testing.assert_array_equal(updates["grad"]["w"], np.full(2, expected))
    np.testing.assert_array_equal(updates["updates"]["w"], updates["grad"]["w"])
    assert updates["grad"]["frozen"] is None
    assert state.arg_sums == {}, "the gradient has been summed already"


def test_grad_costs_no_pass_over_the_gradients():
    """The program that is given `grad` is the one that is not."""
    tx, params = accumulate(2, optax.sgd(1.0)), jnp.zeros(4)
    without = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    given = jax.make_jaxpr(tx.update)(params, tx.init(params), params, grad=params)
    assert len(without.eqns) == len(given.eqns)


@every_step
def test_grad_in_an_eager_loop_has_the_structure_of_the_updates_on_a_hold_too(step):
    """Flax's train states take gradients apart, but not extra arguments."""
    inner = optax.chain(takes("updates", "grad"), optax.stateless(lambda u, _: u["grad"]))
    tx = accumulate(2, inner)
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    for g in (1.0, 3.0):
        params, state = step(tx, {"w": jnp.full(2, g)}, state, params, grad=jnp.full(2, g))
    np.testing.assert_array_equal(params["w"], [2.0, 2.0])


def test_none_for_grad_stays_none():
    updates, _ = release(accumulate(1, takes("grad")), jnp.zeros(2), (jnp.ones(2), {"grad": None}))
    assert updates == {"grad": None}


# Averages of trees.


def test_another_gradient_is_averaged_if_it_is_named():
    """Behind a link that clips, `grad` is the gradient as it was."""
    named = accumulate(2, takes("updates", "value", "grad"), average_args=("value", "grad"))
    params = {"w": jnp.zeros(2, jnp.bfloat16), "frozen": jnp.zeros(3)}
    calls = [
        (
            {"w": jnp.full(2, g, jnp.bfloat16), "frozen": None},
            {"grad": {"w": jnp.full(2, g, jnp.bfloat16), "frozen": None}, "value": g, "weight": w},
        )
        for g, w in ((2.0, 3.0), (6.0, 1.0))
    ]
    updates, state = release(optax.chain(optax.clip(1.0), named), params, *calls)
    np.testing.assert_array_equal(updates["updates"]["w"], [1.0, 1.0])
    np.testing.assert_array_equal(updates["grad"]["w"], [3.0, 3.0])
    assert updates["grad"]["w"].dtype == jnp.bfloat16
    assert updates["value"] == 3.0
    sums = get_state(state).arg_sums
    assert jax.tree.map(jnp.shape, sums) == {
        "sum_of_value": (),
        "sum_of_grad": {"w": (2,), "frozen": (3,)},
    }
    assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype(jnp.float32)}
    assert window_metrics(state)["value"] == 3.0
    assert "grad" not in window_metrics(state)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("like", [jnp.zeros, functools.partial(jax.ShapeDtypeStruct, dtype="f4")])
def test_any_tree_is_averaged_if_its_shapes_are_given(k, like):
    """Such as the statistics that a second-order optimizer preconditions with."""
    likes = {"value": like(()), "factors": {"a": like((2, 2)), "b": [like((3,))]}}
    tx = accumulate(k, takes("value", "factors"), average_args=likes)

    def call(x):
        factors = {"a": jnp.full((2, 2), x), "b": [jnp.full(3, 10 * x)]}
        return jnp.zeros(2), {"factors": factors, "value": x}

    updates, state = release(tx, jnp.zeros(2), *[call(x) for x in (3.0, 5.0)][:k])
    mean = (3.0, 4.0)[k - 1]
    expected = {"a": np.full((2, 2), mean), "b": [np.full(3, 10 * mean)]}
    jax.tree.map(np.testing.assert_array_equal, updates["factors"], expected)
    assert updates["value"] == mean
    # Nothing of one window reaches the next.
    grads, extra_args = call(jnp.nan)
    _, state = tx.update(grads, state, weight=0, release=True, **extra_args)
    for _ in range(k):
        updates, state = tx.update(*call(7.0)[:1], state, **call(7.0)[1])
    np.testing.assert_array_equal(updates["factors"]["a"], np.full((2, 2), 7.0))


def test_trees_of_devices_are_averaged_over_all_of_them():
    mesh = make_mesh(AxisType.Auto)
    tx = accumulate(2, takes("grad"), average_args=("grad",), reduce_axes="data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def window(x):
        params = {"w": jnp.zeros(2)}
        state = tx.init(params)
        for i in range(2):
            grads = {"w": jnp.full(2, x[0, i])}
            updates, state = tx.update(
                grads, state, params, grad=optax.tree.scale(2.0, grads), weight=x[0, i]
            )
        return updates["grad"]["w"]

    x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    np.testing.assert_allclose(window(x), np.full(2, 2 * np.sum(x * x) / np.sum(x)), rtol=1e-6)


@needs_reshard
def test_a_tree_that_waits_to_be_reduced_is_refused():
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        tx = accumulate(2, average_args=("grad",), reduce_axes="data")

        @jax.jit
        def microbatch(params):
            grads = jax.reshard(params, P(unreduced={"data"}))
            return tx.update(grads, tx.init(params), params, grad=grads)

        with pytest.raises(TypeError, match=r"of `grad`.*is unreduced over \['data'\]"):
            microbatch(jnp.zeros(2))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"w": jnp.ones(2)}, ValueError, r"`grad` \(one of `average_args`\) must have the tree"),
        (
            {"w": jnp.ones(3), "b": 1.0},
            ValueError,
            r"leaf \['w'\] of `grad`.*fit float32\[2\], got float32\[3\]",
        ),
        ({"w": jnp.ones(2, int), "b": 1.0}, ValueError, r"leaf \['w'\].*got int32\[2\]"),
        ({"w": jnp.ones(2), "b": 1j}, ValueError, r"leaf \['b'\].*fit float32\[\], got 1j"),
        ({"w": jnp.ones(2), "b": "1"}, ValueError, r"leaf \['b'\].*got '1' of type str"),
    ],
)
def test_a_tree_that_does_not_fit_its_sum_is_refused(given, error, said):
    params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    tx = accumulate(2, average_args=("grad",))
    with pytest.raises(error, match=said):
        tx.update(params, tx.init(params), grad=given)


def test_arguments_that_cannot_be_named_are_refused():
    with pytest.raises(TypeError, match=r"leaf \['n'\] of `average_args\['x'\]`.*int32\[2\]"):
        accumulate(2, average_args={"x": {"n": jnp.ones(2, int)}})
    with pytest.raises(TypeError, match=r"`window_args` must be a tuple of names"):
        accumulate(2, window_args="value_fn")  # pyright: ignore
    with pytest.raises(ValueError, match=r"`window_args` cannot name 'params'"):
        accumulate(2, window_args=("params",))
    with pytest.raises(ValueError, match=r"'x' is named by `average_args` and by `window_args`"):
        accumulate(2, average_args=("x",), window_args=("x",))


# Functions.

WIDTH, SIZES, WINDOWS = 5, (7, 7, 2), 4  # two shapes to compile
EDGES = np.cumsum([0, *SIZES])
PARAMS = {"w": np.full((WIDTH, 2), 0.1), "b": np.zeros(2)}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(WINDOWS, EDGES[-1], WIDTH))
Y = np.tanh(X[..., :2]) + 0.1 * RNG.normal(size=(WINDOWS, EDGES[-1], 2))


def loss_fn(params, x, y):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["w"] + params["b"]) - y))


def sam(opaque):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(0.2), adversary, opaque_mode=opaque)


def functions(x, y):
    """Returns what optimizers call of these rows; a SAM takes nothing else."""
    loss = functools.partial(loss_fn, x=x, y=y)
    return {
        "value_fn": lambda p: loss(p),
        "obj_fn": lambda p: loss(p),
        "grad_fn": lambda p, _: jax.grad(loss)(p),
    }


LINE_SEARCH = ("value", "grad", "value_fn")
# An optimizer, and what it is given.
INNERS = {
    "lbfgs": (lambda: optax.lbfgs(8.0), LINE_SEARCH),
    "backtracking": (
        lambda: optax.chain(
            optax.sgd(16.0), optax.scale_by_backtracking_linesearch(15, store_grad=True)
        ),
        LINE_SEARCH,
    ),
    "sam": (lambda: sam(True), ("grad_fn",)),
    "sophia": (lambda: optax.contrib.sophia(0.01, clip_threshold=99.0), ("obj_fn",)),
}
every_inner = pytest.mark.parametrize(
    ("inner", "names"),
    [
        # What the other line search shares with L-BFGS runs on one version.
        pytest.param(*row, id=name, marks=[pytest.mark.slow] * (name == "backtracking"))
        for name, row in INNERS.items()
    ],
)


def train(tx, names, sizes, of_window, step=update_and_apply, params=PARAMS):
    """Returns the parameters after all windows, in microbatches of these sizes.

    Args:
        tx: the optimizer.
        names: of the extra arguments that it is given.
        sizes: rows of each microbatch; one size is the full batch.
        of_window: whether functions are of all rows of the window.
        step: how it is stepped.
        params: to begin with.
    """
    params = jax.tree.map(jnp.asarray, params)

    @functools.partial(jax.jit, static_argnames="size")
    def run(params, state, x, y, window, size):
        value, grad = jax.value_and_grad(loss_fn)(params, x, y)
        given = {"value": value, "grad": grad, **functions(*(window if of_window else (x, y)))}
        extra_args = {name: given[name] for name in names}
        if len(sizes) > 1:
            extra_args["weight"] = float(size)
        return step(tx, grad, state, params, **extra_args)

    state = tx.init(params)
    for window in zip(X, Y, strict=True):
        for a, b in itertools.pairwise(np.cumsum([0, *sizes])):
            x, y = (rows[a:b] for rows in window)
            params, state = run(params, state, x, y, window, int(b - a))
    return params


def distance(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), a, b)))


@functools.cache
def full_batch(inner, names):
    """Returns the parameters after the windows as full batches, in double precision."""
    return train(inner(), names, [sum(SIZES)], of_window=True)


@every_inner
@pytest.mark.usefixtures("x64")
def test_functions_of_the_window_give_the_result_of_the_full_batch(inner, names):
    """In double precision, so that only a method can differ; a line search amplifies rounding."""
    averaged = tuple(name for name in names if name == "value")
    called = tuple(name for name in names if name.endswith("_fn"))
    tx = accumulate(len(SIZES), inner(), average_args=averaged, window_args=called)
    full = full_batch(inner, names)
    assert distance(full, PARAMS) > 0.1
    held = train(tx, names, SIZES, of_window=True, step=apply_gradients)
    assert distance(held, full) < 1e-6
    # Functions of the last microbatch, said to be the window's, would have been another method.
    assert distance(train(tx, names, SIZES, of_window=False), full) > 1e-3


@every_inner
@every_step
@pytest.mark.usefixtures("x64")
def test_a_function_of_one_microbatch_is_refused(inner, names, step):
    (called,) = (name for name in names if name.endswith("_fn"))
    tx = accumulate(len(SIZES), inner())
    remedies = rf"`inner` calls `{called}`.*value_and_grad.*window_args=\('{called}',\)"
    with pytest.raises(TypeError, match=remedies):
        train(tx, names, SIZES, of_window=False, step=step)
    # In a loop without `jax.jit`, by a hold that returns updates: it asks for their shapes.
    params = grads = jax.tree.map(jnp.asarray, PARAMS)
    given = {"value": 1.0, "grad": grads, **functions(X[0], Y[0])}
    extra_args = {name: given[name] for name in names}
    with pytest.raises(TypeError, match=remedies):
        step(tx, grads, tx.init(params), params, release=step is not update_and_apply, **extra_args)


@every_inner
@pytest.mark.usefixtures("x64")
def test_at_every_k_1_a_function_of_the_microbatch_is_the_windows(inner, names):
    alone = train(accumulate(1, inner()), names, [sum(SIZES)], of_window=False)
    assert distance(alone, full_batch(inner, names)) < 1e-9


@every_step
@pytest.mark.usefixtures("x64")
def test_functions_that_inner_does_not_call_may_be_passed(step):
    """Optax gives them to every optimizer alike, so that one can be exchanged for another."""
    names = ("value", "grad", "value_fn", "grad_fn", "obj_fn")
    train(accumulate(len(SIZES), optax.adam(0.1)), names, SIZES, of_window=False, step=step)


@pytest.mark.parametrize(
    "function",
    [jax.jit(jnp.sum), functools.partial(jnp.sum), jax.tree_util.Partial(jnp.vdot, jnp.ones(2))],
    ids=["jit", "partial", "Partial"],
)
def test_every_kind_of_function_is_refused(function):
    def update(updates, state, params=None, *, fun, kind):
        assert (updates * kind(fun(updates))).shape == (2,)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = accumulate(1, inner)  # a class is not a function of data
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), fun=function, kind=jnp.float32)
    tx = accumulate(2, inner)
    with pytest.raises(TypeError, match="`inner` calls `fun`"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), fun=function, kind=jnp.float32)


@pytest.mark.parametrize("name", ["value", "x"])
def test_what_a_line_search_gives_to_the_function_must_be_the_windows_too(name):
    """`scale_by_zoom_linesearch` hands extra arguments on to `value_fn`."""
    tx = accumulate(2, optax.lbfgs(), window_args=("value_fn",))
    params = jnp.ones(2)
    extra_args = {name: jnp.ones(()), "grad": params, "value_fn": lambda p, x: jnp.sum(p * x)}
    with pytest.raises(ValueError, match=f"`{name}` belongs to one microbatch.*name it in"):
        tx.update(params, tx.init(params), params, **extra_args)


@pytest.mark.usefixtures("x64")
def test_a_transparent_sam_takes_a_window_for_each_of_its_steps():
    """Its adversarial steps see other rows than those that they are undone with, as in Optax."""
    tx = accumulate(len(SIZES), sam(False))
    full = train(sam(False), (), [sum(SIZES)], of_window=False)
    assert distance(full, PARAMS) > 0.1
    assert distance(train(tx, (), SIZES, of_window=False), full) < 1e-9


@pytest.mark.usefixtures("x64")
def test_value_and_grad_from_state_finds_the_line_searchs_alone():
    """With the same rows in each window Optax's loop takes the same steps."""
    x, y = X[0], Y[0]
    params = jax.tree.map(jnp.asarray, PARAMS)
    window_loss = functions(x, y)["value_fn"]
    value_and_grad = optax.value_and_grad_from_state(window_loss)

    def solve(tx, steps):
        @jax.jit
        def run(params, state):
            value, grad = value_and_grad(params, state=state)
            extra_args = {"value": value, "grad": grad, "value_fn": window_loss}
            return apply_gradients(tx, grad, state, params, **extra_args)

        found, state = params, tx.init(params)
        for _ in range(steps):
            found, state = run(found, state)
        return found, state

    full, _ = solve(optax.lbfgs(), 5)
    named = {"average_args": ("value", "grad"), "window_args": ("value_fn",)}
    held, state = solve(accumulate(2, optax.lbfgs(), **named), 10)
    assert distance(held, full) < 1e-9
    assert optax.tree.get(state, "value") == pytest.approx(float(window_loss(held)))


def test_a_state_of_before_says_how_to_go_on():
    tx = accumulate(2, average_args=("value",))
    state = tx.init(PARAMS)
    before = state._replace(arg_sums={"value": jnp.zeros(())})
    with pytest.raises(ValueError, match=re.escape("arg_sums=tx.init(params).arg_sums")):
        tx.update(PARAMS, before, value=1.0)


# Extra arguments that are almost ours: most of Optax takes any and says nothing.


ONES = {"w": jnp.ones(2)}
TWOS = {"w": jnp.full(2, 2.0)}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("weights", "weight"), ("wieght", "weight"), ("Weight", "weight"), ("realease", "release")],
)
@pytest.mark.parametrize("every_k", [1, 2])
def test_a_mistyped_extra_argument_is_refused_with_what_was_meant(typed, meant, every_k):
    tx = optaccum.accumulate(every_k, optax.adam(0.1))
    message = rf"`{typed}` is not an argument of `accumulate`; did you mean `{meant}`\?"
    for step in (tx.update, lambda *args, **kwargs: optaccum.apply_gradients(tx, *args, **kwargs)):
        with pytest.raises(TypeError, match=message):
            step(TWOS, tx.init(ONES), ONES, **{typed: 3.0})
    tx.update(TWOS, tx.init(ONES), ONES, value=3.0, weight_decay=0.1)


def test_an_argument_that_inner_names_is_not_mistyped():
    for inner in (reading("weights"), reading("wieght")):
        (name,) = set(optaccum._spelling.named_by(inner.update)) & {"weights", "wieght"}
        tx = optaccum.accumulate(1, inner)
        updates, _ = tx.update(TWOS, tx.init(ONES), ONES, **{name: 3.0})
        np.testing.assert_array_equal(updates["w"], np.full(2, 6.0))
    tx = optaccum.accumulate(1, optax.sgd(1.0), average_args=("weights",))
    tx.update(TWOS, tx.init(ONES), ONES, weights=3.0)
