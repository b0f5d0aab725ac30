"""What is logged of a window: at every k, in a jitted loop, on many devices and in train states."""

import functools

from flax import linen as nn, nnx
from helpers import meshes, tokens
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest
import reference

import optaccum
from optaccum import accumulate, apply_gradients, skip_not_finite, window_metrics
import optaccum.flax

PARAMS = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
WEIGHTS = (1.0, 3.0, 2.0)
LOSSES = (5.0, 1.0, 4.0)
KEYS = ("gradient_step", "mini_step", "released", "skipped", "weight", "grad_norm")


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=p.shape).astype(np.float32) for name, p in PARAMS.items()}


def norm(tree):
    return np.sqrt(sum(float(np.sum(np.asarray(x, float) ** 2)) for x in tree.values()))


def logged(tx, calls, **options):
    """Returns the metrics after each call of (weight, loss, gradients), in one jitted program."""

    @jax.jit
    def step(grads, state, params, weight, loss):
        params, state = apply_gradients(tx, grads, state, params, weight=weight, loss=loss)
        return params, state, window_metrics(state, grads, **options)

    params, state, found = PARAMS, tx.init(PARAMS), []
    for weight, loss, grads in calls:
        params, state, metrics = step(grads, state, params, jnp.float32(weight), jnp.float32(loss))
        found.append(jax.device_get(metrics))
    return found


@pytest.mark.parametrize(
    "k", [3, lambda step: 3, jnp.int32(3)], ids=["constant", "function", "array"]
)
def test_numbers_of_an_open_window_are_those_so_far(k):
    tx = accumulate(k, optax.adam(0.1), metrics=("loss",))
    calls = list(zip(WEIGHTS, LOSSES, map(gradients, range(3)), strict=True))
    found = logged(tx, calls)
    assert [m["released"] for m in found] == [False, False, True]
    assert [m["mini_step"] for m in found] == [1, 2, 0]
    for n, metrics in enumerate(found, 1):
        weight = sum(WEIGHTS[:n])
        mean = {name: sum(w * g[name] for w, _, g in calls[:n]) / weight for name in PARAMS}
        loss = sum(w * x for w, x, _ in calls[:n]) / weight
        expected = {"weight": weight, "grad_norm": norm(mean), "loss": loss, "skipped": 0}
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
    assert set(found[0]) == {*KEYS, "loss"}


@pytest.mark.parametrize(
    "k", [1, lambda step: 1, jnp.int32(1)], ids=["constant", "function", "array"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_same_program_runs_at_k_1(k, reduction):
    tx = accumulate(k, optax.adam(0.1), metrics=("loss",), loss_reduction=reduction)
    calls = list(zip(WEIGHTS, LOSSES, map(gradients, range(3)), strict=True))
    for i, metrics in enumerate(logged(tx, calls, loss_reduction=reduction)):
        divisor = WEIGHTS[i] if reduction == "sum" else 1
        assert metrics["released"]
        assert metrics["gradient_step"] == i + 1
        np.testing.assert_allclose(metrics["weight"], WEIGHTS[i])
        np.testing.assert_allclose(metrics["grad_norm"], norm(calls[i][2]) / divisor, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"], LOSSES[i] / divisor, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_before_the_first_microbatch_nothing_is_nan(k):
    tx = accumulate(k, optax.adam(0.1), average_args=("value",), metrics=("loss",))
    metrics = window_metrics(tx.init(PARAMS), PARAMS)
    assert set(metrics) == {*KEYS, "value", "loss"}
    for value in metrics.values():
        assert value == 0


@pytest.mark.parametrize("k", [1, 2])
def test_a_rejected_microbatch_leaves_no_trace(k):
    tx = accumulate(k, optax.sgd(0.1), metrics=("loss",), should_skip_update_fn=skip_not_finite)
    bad = jax.tree.map(lambda p: np.full(p.shape, np.nan, np.float32), PARAMS)
    first, second = logged(tx, [(2.0, 5.0, gradients(0)), (9.0, np.nan, bad)])
    assert second["skipped"] == 1
    assert not second["released"]
    assert second["weight"] == first["weight"] == 2
    assert second["loss"] == first["loss"] == 5
    assert second["grad_norm"] == (0 if k == 1 else first["grad_norm"])


def test_metrics_are_not_seen_by_the_inner_optimizer():
    """Even one that would refuse them; what `average_args` names it gets as the mean."""
    given = []

    def update(updates, state, params=None, *, value):
        del params
        given.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = accumulate(2, inner, average_args=("value",), metrics=("loss", "accuracy"))
    state = tx.init(PARAMS)
    for i in range(2):
        _, state = tx.update(gradients(i), state, PARAMS, value=1.0 + i, loss=3.0, accuracy=i)
    assert float(given[-1]) == 1.5
    assert window_metrics(state)["accuracy"] == 0.5


@pytest.mark.parametrize("k", [1, 2])
def test_the_norm_is_that_of_the_mean_over_what_has_a_gradient(k):
    """The norm is that of the mean, over what has a gradient."""
    params, grads = PARAMS | {"steps": jnp.arange(3)}, gradients(0) | {"steps": None}
    tx = accumulate(k, optax.sgd(0.1), use_grad_mean=False)
    state = tx.init(params)
    for _ in range(k):
        _, state = tx.update(grads, state, params)
    found = window_metrics(state, grads)["grad_norm"]
    np.testing.assert_allclose(found, norm(gradients(0)), rtol=1e-6)


@pytest.mark.parametrize(("returned", "more"), [("grad_norm", 1), ("loss", 0)])
def test_what_a_hold_pays_for_metrics_that_it_returns(returned, more):
    """On a CPU: a norm is one more reading, besides the three passes of an addition.

    XLA of older JAX writes what it reads for a norm once more.
    """
    params = {"w": jnp.zeros(1 << 16)}
    tx = accumulate(4, optax.sgd(0.1), metrics=("loss",))

    def hold(params, state, grads):
        params, state = apply_gradients(tx, grads, state, params, loss=1.0, release=False)
        return params, state, window_metrics(state)[returned]

    program = jax.jit(hold, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    moved = program.cost_analysis()["bytes accessed"] / (4 << 16)
    assert moved == pytest.approx(3 + more, abs=0.01) or moved > 3 + more > 3


def test_under_jit_an_unused_norm_costs_nothing():
    tx = accumulate(4, optax.sgd(0.1), metrics=("loss",))
    state = tx.init({"w": jnp.zeros(1024)})

    def text(name):
        return jax.jit(lambda state: window_metrics(state)[name]).lower(state).compile().as_text()

    assert "f32[1024]" in text("grad_norm")
    assert "f32[1024]" not in text("loss")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"metrics": "loss"}, TypeError, "`metrics` must be a tuple of names"),
        ({"metrics": ("weight",)}, ValueError, "`metrics` cannot name 'weight'"),
        (
            {"metrics": ("value",), "average_args": ("value",)},
            ValueError,
            "'value' is named by `average_args` and by `metrics`",
        ),
    ],
)
def test_names_that_cannot_be_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        accumulate(4, **options)


def test_what_cannot_be_read_is_refused():
    match = "name 'grad_norm', which `window_metrics` returns itself"
    with pytest.raises(ValueError, match=match):
        accumulate(2, metrics=("grad_norm",))
    named = accumulate(2, average_args=("grad_norm",)).init(PARAMS)  # `inner` may want it
    with pytest.raises(ValueError, match=match):
        window_metrics(named)
    with pytest.raises(ValueError, match="pass the `grads` of the update before it"):
        window_metrics(accumulate(1).init(PARAMS))
    with pytest.raises(ValueError, match=r"`every_k` is the constant 1 or the parameters are \(\)"):
        window_metrics(accumulate(2).init(()))
    assert window_metrics(accumulate(2).init(()), ())["grad_norm"] == 0
    members = jax.vmap(accumulate(2).init)(jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS))
    with pytest.raises(ValueError, match=r"`jax.vmap\(window_metrics\)\(...\)`"):
        window_metrics(members)
    assert jax.vmap(window_metrics)(members)["weight"].shape == (2,)
    with pytest.raises(ValueError, match="`loss_reduction` must be 'mean' or 'sum'"):
        window_metrics(accumulate(2).init(PARAMS), loss_reduction="token")
    with pytest.raises(ValueError, match="holds no AccumulateState"):
        window_metrics(optax.sgd(0.1).init(PARAMS))


def test_a_forgotten_metric_is_an_error():
    tx = accumulate(2, metrics=("loss",))
    with pytest.raises(ValueError, match=r"name.* 'loss', but the update was called without it"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_a_state_with_other_metrics_says_how_to_go_on():
    old, new = accumulate(4, metrics=("loss",)), accumulate(4, metrics=("loss", "accuracy"))
    state = old.init(PARAMS)
    with pytest.raises(
        ValueError, match=r"`state._replace\(arg_sums=tx.init\(params\).arg_sums\)`"
    ):
        new.update(PARAMS, state, loss=1.0, accuracy=1.0)


def test_a_linen_train_state_can_be_read():
    tx = accumulate(2, optax.adam(0.1), metrics=("loss",))
    model = nn.Dense(1)
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    state = optaccum.flax.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    grads = jax.tree.map(jnp.ones_like, params)
    for loss in (1.0, 2.0):
        state = state.apply_gradients(grads=grads, loss=loss)
    metrics = window_metrics(state.opt_state)
    assert metrics["released"]
    assert metrics["loss"] == 1.5
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(3), rtol=1e-6)


def test_an_nnx_optimizer_can_be_read():
    tx = accumulate(2, optax.adam(0.1), metrics=("loss",))
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = optaccum.flax.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
    for loss in (1.0, 2.0):
        optimizer.update(model, grads, loss=loss)
    metrics = window_metrics(optimizer.opt_state)
    assert metrics["released"]
    assert metrics["loss"] == 1.5
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_parts_of_devices_are_read_as_one(inside):
    """The numbers of all devices, read inside and outside of `jax.shard_map`."""
    mesh = meshes.make_mesh(AxisType.Auto)
    tx = accumulate(tokens.K, tokens.INNER, reduce_axes="data", metrics=("value",))
    with jax.set_mesh(mesh):
        init, step = tokens.make_programs(tx, mesh)
        params, state = jax.tree.map(jnp.copy, tokens.PARAMS), init(tokens.PARAMS)
        for i in range(tokens.K):
            params, state = step(params, state, tokens.X[i], tokens.MASK[i])
        if inside:
            read = jax.shard_map(window_metrics, mesh=mesh, in_specs=(tokens.SPECS,), out_specs=P())
            metrics = jax.jit(read)(state)
        else:
            metrics = window_metrics(state)
    x, mask = tokens.X[: tokens.K].reshape(-1, 40), tokens.MASK[: tokens.K].reshape(-1)
    loss, grads = jax.value_and_grad(tokens.loss_fn)(tokens.PARAMS, x, mask)
    assert metrics["released"]
    np.testing.assert_allclose(metrics["weight"], mask.sum())
    np.testing.assert_allclose(metrics["value"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


@meshes.needs_reshard
def test_unreduced_sums_are_read_as_one():
    mesh = meshes.make_mesh(AxisType.Explicit)
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")

    def loss(params, x, mask):
        return jnp.sum(mask[:, None] * (x @ params["w"]) ** 2) / jnp.sum(mask)

    with jax.set_mesh(mesh):
        params, place = tokens.replicated(mesh, {"w": jnp.ones((40, 3))})
        state, step = tx.init(params), tokens.explicit_step(tx, loss)
        before = jax.device_get(params)
        for i in range(2):
            params, state = step(params, state, place(tokens.X[i]), place(tokens.MASK[i]))
        metrics = jax.jit(functools.partial(window_metrics))(state)
    x, mask = tokens.X[:2].reshape(-1, 40), tokens.MASK[:2].reshape(-1)
    expected = optax.tree.norm(jax.grad(loss)(before, x, mask))
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-5)


# Metrics with a reduction, and of trees.


LOAD = jax.ShapeDtypeStruct((3,), jnp.float32)
REDUCED = {
    "loss": "mean",
    "router": ("mean", np.zeros(3, np.float32)),
    "load": ("sum", {"experts": LOAD, "tokens": jax.ShapeDtypeStruct((), jnp.int32)}),
    "logit": "max",
    "peaks": ("max", LOAD),
    "accuracy": "ratio",
    "recall": ("ratio", LOAD),
}


def values_of(i, nan=False):
    """Returns the metrics of microbatch i."""
    rng = np.random.default_rng(i)
    load = rng.integers(0, 9, size=3)
    poison = np.float32(np.nan if nan else 0)
    return {
        "loss": np.float32(rng.normal()) + poison,
        "router": rng.normal(size=3).astype(np.float32) + poison,
        "load": {"experts": load.astype(np.float32) + poison, "tokens": np.int32(load.sum())},
        "logit": np.float32(rng.normal() - 5) + poison,
        "peaks": rng.normal(size=3).astype(np.float32) - 5 + poison,
        "accuracy": (np.int32(load[0]), np.int32(load.sum())),
        "recall": (load.astype(np.float32) * 0.5 + poison, np.array([0, 1, 2], np.float32)),
    }


def reduced(window):
    """Returns what the window's accepted microbatches, (weight, values), add up to."""
    weights = [weight for weight, _ in window]

    def of(name, get):
        spec = REDUCED[name]
        reduction = spec if isinstance(spec, str) else spec[0]
        values = [np.asarray(get(values[name])) for _, values in window]
        return reference.reduced_metric(reduction, values, weights)

    whole = {name: of(name, lambda x: x) for name in REDUCED if name != "load"}
    load = {key: of("load", lambda x, key=key: x[key]) for key in ("experts", "tokens")}
    return whole | {"load": load}


def assert_reduced(found, window, tolerance):
    for name, expected in reduced(window).items():
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance),
            found[name],
            expected,
        )


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "k", [1, 3, lambda step: 3, jnp.int32(3)], ids=["one", "constant", "function", "array"]
)
def test_metrics_are_reduced_over_the_microbatches_of_a_window_that_count(k, jitted):
    tx = accumulate(k, optax.sgd(0.1), metrics=REDUCED, should_skip_update_fn=skip_not_finite)

    def step(params, state, grads, weight, values):
        params, state = apply_gradients(tx, grads, state, params, weight=weight, **values)
        return params, state, window_metrics(state, grads)

    run = jax.jit(step) if jitted else step
    params, state, window = PARAMS, tx.init(PARAMS), []
    length = 1 if k == 1 else 3
    fresh = window_metrics(state, PARAMS)
    assert all(not np.any(x) for name in REDUCED for x in jax.tree.leaves(fresh[name]))
    # Of weight 0 with NaN, rejected with NaN; a window that opens with weight 0, and one of 0.
    for i, weight in enumerate([2, 0, 1, 0, 3, -1, 2, 1, 0, 0, 0, 5]):
        values = values_of(i, nan=weight <= 0)
        grads = gradients(i)
        if weight < 0:
            grads, weight = jax.tree.map(lambda g: g * np.nan, grads), 1
        elif len(window) == length:
            window = [(weight, values)]
        else:
            window.append((weight, values))
        params, state, found = run(params, state, grads, jnp.float32(weight), values)
        # At most three products and additions of float32, and a quotient.
        assert_reduced(found, window, 5e-7)


def test_a_resumed_window_goes_on_with_its_metrics():
    tx = accumulate(3, metrics=REDUCED)
    state = tx.init(PARAMS)
    for i in range(2):
        _, state = tx.update(PARAMS, state, **values_of(i))
    saved = [np.asarray(x) for x in jax.tree.leaves(state)]
    state = jax.tree.unflatten(jax.tree.structure(tx.init(PARAMS)), map(jnp.asarray, saved))
    _, state = tx.update(PARAMS, state, **values_of(2))
    expected = reduced([(1.0, values_of(i)) for i in range(3)])
    found = window_metrics(state)
    for name in REDUCED:
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=5e-7), found[name], expected[name]
        )


def test_members_of_vmap_have_metrics_of_their_own():
    tx = accumulate(2, metrics=REDUCED)
    params = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    state = jax.vmap(tx.init)(params)
    for i in range(2):
        values = jax.tree.map(lambda *x: jnp.stack(x), values_of(i), values_of(10 + i))
        _, state = jax.vmap(lambda g, s, v: tx.update(g, s, **v))(params, state, values)
    found = jax.vmap(window_metrics)(state)
    for member, first in enumerate((0, 10)):
        expected = reduced([(1.0, values_of(first + i)) for i in range(2)])
        for name in REDUCED:
            jax.tree.map(
                lambda a, e, m=member: np.testing.assert_allclose(a[m], e, rtol=5e-7),
                found[name],
                expected[name],
            )


def test_a_nan_in_the_largest_value_of_a_microbatch_that_counts_is_shown_and_goes_with_it():
    tx = accumulate(2, metrics={"logit": "max"})
    state = tx.init(PARAMS)
    for logit in (np.nan, 1.0):
        _, state = tx.update(PARAMS, state, logit=logit)
    assert np.isnan(window_metrics(state)["logit"])
    for logit in (-2.0, -1.0):
        _, state = tx.update(PARAMS, state, logit=logit)
    assert window_metrics(state)["logit"] == -1


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_metrics_of_devices_are_reduced_as_one(inside):
    mesh = meshes.make_mesh(AxisType.Auto)
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data", metrics=REDUCED)
    count = len(mesh.devices)
    values = [
        jax.tree.map(lambda *x: jnp.stack(x), *(values_of(i * count + d) for d in range(count)))
        for i in range(2)
    ]
    weights = jnp.arange(2.0 * count).reshape(2, count) % 3

    def step(state, weight, values):
        grads = meshes.vary({"w": jnp.ones(2)})
        values = jax.tree.map(lambda x: x[0], values)
        return tx.update(grads, state, weight=weight[0], **values)[1]

    with jax.set_mesh(mesh):
        specs = optaccum.state_shardings(tx, {"w": jnp.ones(2)}, {"w": P()})
        state = jax.jit(jax.shard_map(tx.init, in_specs=P(), out_specs=specs))({"w": jnp.ones(2)})
        run = jax.jit(jax.shard_map(step, in_specs=(specs, P("data"), P("data")), out_specs=specs))
        for weight, value in zip(weights, values, strict=True):
            state = run(state, weight, value)
        if inside:
            found = jax.jit(jax.shard_map(window_metrics, in_specs=(specs,), out_specs=P()))(state)
        else:
            found = window_metrics(state)
    window = [
        (float(weights[i, d]), values_of(i * count + d)) for i in range(2) for d in range(count)
    ]
    assert_reduced(found, window, 2e-6)


def test_metrics_of_an_nnx_optimizer_are_arrays():
    tx = accumulate(2, optax.sgd(0.1), metrics=REDUCED)
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = optaccum.flax.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
    for i in range(2):
        optimizer.update(model, grads, **values_of(i))
    found = window_metrics(optimizer.opt_state)
    expected = reduced([(1.0, values_of(i)) for i in range(2)])
    for name in REDUCED:
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=5e-7), found[name], expected[name]
        )


def test_a_mean_by_name_and_by_reduction_are_one_program():
    def text(metrics):
        tx = accumulate(2, optax.adam(0.1), metrics=metrics)

        def step(grads, state, params, loss):
            params, state = apply_gradients(tx, grads, state, params, loss=loss)
            return params, state, window_metrics(state)

        return jax.jit(step).lower(PARAMS, tx.init(PARAMS), PARAMS, 1.0).as_text()

    assert text(("loss",)) == text({"loss": "mean"})


@pytest.mark.parametrize(
    ("metrics", "error", "text"),
    [
        ({"loss": "min"}, ValueError, r"`metrics\['loss'\]` must be 'mean', 'sum', 'max' or 'rat"),
        ({"load": LOAD}, ValueError, r"`metrics\['load'\]` must be 'mean'"),
        ({"load": (LOAD, "sum")}, ValueError, r"`metrics\['load'\]` must be 'mean'"),
        ({"grad_norm": "max"}, ValueError, "which `window_metrics` returns itself"),
        ({"weight": "sum"}, ValueError, "`metrics` cannot name 'weight'"),
    ],
)
def test_reductions_that_cannot_be_are_refused(metrics, error, text):
    with pytest.raises(error, match=text):
        accumulate(2, metrics=metrics)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("accuracy", 0.5, TypeError, r"`accuracy` .* is a ratio; pass a pair, \(numerator, denom"),
        ("router", np.ones(4, np.float32), ValueError, r"must fit float32\[3\], got float32\[4\]"),
        ("load", {"experts": np.ones(3)}, ValueError, r"`load` .* must have the tree structure"),
        ("logit", np.ones(3), TypeError, r"`logit` .* must be a scalar"),
        ("peaks", "high", ValueError, r"`peaks` .* must fit float32\[3\]"),
    ],
)
def test_values_that_do_not_fit_their_metric_are_refused(name, value, error, text):
    tx = accumulate(2, metrics=REDUCED)
    with pytest.raises(error, match=text):
        tx.update(PARAMS, tx.init(PARAMS), **(values_of(0) | {name: value}))
