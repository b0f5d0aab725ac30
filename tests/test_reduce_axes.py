"""Gradients that are parts of a sum over devices are accumulated as parts, and reduced once."""

import functools
import re

from helpers.hlo import collectives, temporaries
from helpers.meshes import DEVICES, make_mesh, vary
from helpers.steps import STEPS
from helpers.tokens import (
    BYTES,
    INNER,
    MASK,
    PARAMS,
    ROWS,
    SCALAR_BYTES,
    SPECS,
    K,
    X,
    assert_close,
    full_batches,
    loss_fn,
    make_programs,
)
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest

from optaccum import (
    accumulate,
    apply_gradients,
    get_state,
    skip_not_finite,
    state_shardings,
    value_and_grad,
)


@pytest.fixture
def mesh():
    return make_mesh(AxisType.Auto)


def train(programs, x=X, mask=MASK):
    init, step = programs
    params, state = jax.tree.map(jnp.copy, PARAMS), init(PARAMS)
    for i in range(len(x)):
        params, state = step(params, state, x[i], mask[i])
    return params, state


@pytest.mark.parametrize("step", STEPS)
def test_shard_map_equals_the_full_batch(mesh, step):
    tx = accumulate(K, INNER, reduce_axes="data", average_args=("value",))
    params, state = train(make_programs(tx, mesh, step))
    assert_close(params, full_batches())
    assert jax.tree.map(jnp.shape, state.grad_sum) == {
        "w": (8, 40, 30),
        "b": (8, 30),
        "scale": (8,),
    }
    assert state.grad_sum["w"].sharding.spec == P("data")
    np.testing.assert_allclose(state.weight, MASK[K:].reshape(K, DEVICES, -1).sum(axis=(0, 2)))
    value = loss_fn(full_batches(windows=((0, K),)), X[K:].reshape(-1, 40), MASK[K:].reshape(-1))
    np.testing.assert_allclose(
        state.arg_sums["sum_of_value"].sum() / state.weight.sum(), value, rtol=1e-5
    )


def test_the_mean_over_devices_is_not_the_mean_over_tokens(mesh):
    tx = accumulate(K, INNER)

    def train_step(params, state, x, mask):
        grads = jax.lax.pmean(jax.grad(loss_fn)(vary(params), x, mask), "data")
        return apply_gradients(tx, grads, state, params, weight=jax.lax.psum(mask.sum(), "data"))

    data = P("data")
    step = jax.shard_map(train_step, mesh=mesh, in_specs=(P(), P(), data, data), out_specs=P())
    params, _ = train((tx.init, jax.jit(step)))
    assert np.max(np.abs(params["w"] - full_batches()["w"])) > 1e-3


def test_the_sum_and_a_window_of_one_equal_the_full_batch(mesh):
    tx = accumulate(K, optax.sgd(0.01), reduce_axes=("data",), use_grad_mean=False)
    params, _ = train(make_programs(tx, mesh))
    assert_close(params, full_batches(optax.sgd(0.01), use_grad_mean=False))
    one = accumulate(1, INNER, reduce_axes=("data",))
    params, _ = train(make_programs(one, mesh))
    assert_close(params, full_batches(windows=tuple((i, i + 1) for i in range(2 * K))))


def test_unweighted_microbatches_of_devices_count_alike(mesh):
    tx = accumulate(2, optax.sgd(1.0), reduce_axes="data")

    def train_step(params, state, x):
        grads = jax.tree.map(lambda p: p * x.sum(), vary(params))
        return apply_gradients(tx, grads, state, params)

    step = jax.jit(
        jax.shard_map(
            train_step, mesh=mesh, in_specs=(P(), SPECS, P("data")), out_specs=(P(), SPECS)
        )
    )
    params = {"w": jnp.ones(())}
    init = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=SPECS))
    state = init(params)
    for x in (jnp.arange(8.0), jnp.arange(8.0, 16)):
        params, state = step(params, state, x)
    assert float(params["w"]) == 1 - np.mean(np.arange(16))


def test_a_scan_inside_shard_map_equals_the_full_batch(mesh):
    tx = accumulate(K, INNER, reduce_axes="data")

    def epoch(params, x, mask):
        def body(carry, batch):
            params, state = carry
            grads = jax.grad(loss_fn)(vary(params), *batch)
            return apply_gradients(tx, grads, state, params, weight=batch[1].sum()), None

        (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), (x, mask))
        return params

    data = P(None, "data")
    run = jax.shard_map(epoch, mesh=mesh, in_specs=(P(), data, data), out_specs=P())
    assert_close(jax.jit(run)(PARAMS, X, MASK), full_batches())


@pytest.mark.parametrize("skip", [optax.skip_not_finite, skip_not_finite], ids=["optax", "ours"])
def test_a_nan_on_one_device_rejects_the_microbatch_on_all(mesh, skip):
    tx = accumulate(K, INNER, reduce_axes="data", should_skip_update_fn=skip)
    x = jnp.concatenate([X[:1], X[:1].at[0, 5].set(jnp.nan), X[1:]])
    mask = jnp.concatenate([MASK[:1], jnp.ones((1, ROWS)), MASK[1:]])
    params, state = train(make_programs(tx, mesh), x, mask)
    assert (int(state.skipped), int(state.gradient_step)) == (1, 2)
    assert_close(params, full_batches())
    assert state.skip_state["should_skip"].shape == ()


def test_what_is_no_weight_on_one_device_counts_nothing_there(mesh):
    tx = accumulate(1, INNER, reduce_axes="data")

    def train_step(params, state, x, mask, bad):
        grads = jax.grad(loss_fn)(vary(params), x, mask)
        weight = jnp.where(jax.lax.axis_index("data") == 2, bad, mask.sum())
        return apply_gradients(tx, grads, state, params, weight=weight)

    data = P("data")
    step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(P(), SPECS, data, data, P()), out_specs=(P(), SPECS)
    )
    init, _ = make_programs(tx, mesh)
    step, start = jax.jit(step), init(PARAMS)
    without = MASK[0].at[4:6].set(0)
    expected = jax.jit(jax.grad(loss_fn))(PARAMS, X[0], without)
    updates, _ = INNER.update(expected, INNER.init(PARAMS), PARAMS)
    for bad in (jnp.nan, -1.0, jnp.inf):
        params, state = step(PARAMS, start, X[0], MASK[0], bad)
        assert_close(params, optax.apply_updates(PARAMS, updates))
        assert (bool(state.released), int(state.skipped)) == (True, 0)


def test_what_is_no_weight_on_all_devices_rejects_the_microbatch(mesh):
    tx = accumulate(2, optax.sgd(1.0), reduce_axes="data")

    def run(weights):
        params = vary(jnp.zeros(1))
        state = tx.init(jnp.zeros(1))
        for i in range(3):
            _, state = tx.update(params + 1.0, state, weight=weights[i])
        return state.mini_step, state.skipped

    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P()))
    assert tuple(map(int, run(jnp.array([1.0, -1.0, 1.0])))) == (0, 1)


def test_a_window_without_weight_is_dropped_on_all_devices(mesh):
    tx = accumulate(K, INNER, reduce_axes="data")
    x, mask = jnp.concatenate([X, X]), jnp.concatenate([jnp.zeros_like(MASK), MASK])
    params, state = train(make_programs(tx, mesh), x, mask)
    assert_close(params, full_batches())
    assert int(state.gradient_step) == 2


def test_shard_map_reduces_once_a_window(mesh):
    tx = accumulate(4, INNER, reduce_axes="data")

    def compiled(**extra_args):
        init, step = make_programs(tx, mesh, **extra_args)
        arguments = PARAMS, init(PARAMS), X[0], MASK[0]
        return step.lower(*arguments).compile()

    # The gradients, and before them the weight that says whether there is something to divide by.
    always, on_release = collectives(compiled())
    assert always == [], "reduced on a hold too"
    assert on_release == [SCALAR_BYTES, BYTES]
    assert collectives(compiled(release=False)) == ([], [])
    always, _ = collectives(compiled(release=True))
    assert sum(always) == BYTES + SCALAR_BYTES


def test_a_hold_in_shard_map_has_no_temporaries(mesh):
    """The optimizer's side alone; a release has the reduced sums."""
    tx = accumulate(K, INNER, reduce_axes="data")
    params = {f"w{i}": jnp.ones((64, 64)) for i in range(4)}
    grads = jax.tree.map(lambda p: jnp.ones((DEVICES, *p.shape)), params)

    def compiled(**extra_args):
        def step(params, state, grads):
            grads = jax.tree.map(lambda g: g[0], grads)
            return apply_gradients(tx, grads, state, params, **extra_args)

        step = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), SPECS, P("data")), out_specs=(P(), SPECS)
        )
        state = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=SPECS))(params)
        program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
        return temporaries(program) / (4 * 4 * 64 * 64)

    assert compiled(release=False) < 0.02
    assert compiled() < 1.1


def make_value_and_grad(mesh, n, fun=loss_fn, check_vma=True, **options):
    options = {"weight_fn": lambda params, x, mask: mask.sum(), **options}
    step = value_and_grad(
        fun, num_microbatches=n, batch_argnums=(1, 2), reduce_axes="data", **options
    )
    specs = P(), P("data"), P("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    return jax.jit(mapped)


BATCH = jnp.concatenate(X[:4]), jnp.concatenate(MASK[:4])


@pytest.mark.parametrize("n", [1, 8])
def test_value_and_grad_equals_the_full_batch_and_reduces_once(mesh, n):
    step = make_value_and_grad(mesh, n)
    assert_close(step(PARAMS, *BATCH), jax.jit(jax.value_and_grad(loss_fn))(PARAMS, *BATCH))
    # The gradients, the loss and the weight, together; a reduction in the loop were there n times.
    compiled = step.lower(PARAMS, *BATCH).compile()
    assert collectives(compiled) == ([BYTES + 2 * SCALAR_BYTES], [])


def test_value_and_grad_without_weights_counts_devices_alike(mesh):
    def plain(params, x, mask):
        return loss_fn(params, x, jnp.ones_like(mask))

    step = make_value_and_grad(mesh, 4, plain, weight_fn=None)
    assert_close(step(PARAMS, *BATCH), jax.value_and_grad(plain)(PARAMS, *BATCH))


def test_value_and_grad_counts_no_device_without_weight(mesh):
    step, (x, mask) = make_value_and_grad(mesh, 2), BATCH
    some = mask.at[8:40].set(0)
    expected = jax.jit(jax.value_and_grad(loss_fn))(PARAMS, x, some)
    assert_close(step(PARAMS, x, some), expected)
    assert_close(step(PARAMS, x.at[8:40].set(jnp.nan), some), expected)
    loss, grads = step(PARAMS, x * jnp.nan, jnp.zeros_like(mask))
    assert optax.tree.norm(grads) == loss == 0

    def judged(params, x, mask):
        return jnp.where(jnp.isnan(x).any(), 0, mask.sum())

    bad = x.at[3].set(jnp.nan), mask
    step = make_value_and_grad(mesh, 1, weight_fn=judged)
    without = mask.at[:8].set(0)  # the rows of that device
    assert_close(step(PARAMS, *bad), jax.jit(jax.value_and_grad(loss_fn))(PARAMS, x, without))


def test_a_loss_that_is_reduced_already_is_refused(mesh):
    """Divided by the number of devices twice, if it were taken."""

    def reduced(params, x, mask):
        return jax.lax.pmean(loss_fn(params, x, mask), "data")

    message = r"`fun` returned a loss that does not vary over \['data'\]"
    with pytest.raises(TypeError, match=message):
        make_value_and_grad(mesh, 2, reduced)(PARAMS, *BATCH)
    with pytest.raises(TypeError, match=f"{message}.*check_vma=False"):
        make_value_and_grad(mesh, 2, check_vma=False)(PARAMS, *BATCH)
    with pytest.raises(ValueError, match=r"'data', but the mesh here has the axes \[\]"):
        value_and_grad(loss_fn, num_microbatches=2, batch_argnums=(1, 2), reduce_axes="data")(
            PARAMS, *BATCH
        )


def test_state_shardings_gives_specs_of_the_state(mesh):
    inner = optax.chain(optax.clip(1.0), accumulate(K, INNER, reduce_axes="data"))
    with jax.set_mesh(mesh):
        specs = state_shardings(inner, PARAMS, P())
    init = jax.shard_map(inner.init, mesh=mesh, in_specs=P(), out_specs=specs)
    state = jax.jit(init)(PARAMS)
    assert jax.tree.map(jnp.shape, get_state(state).grad_sum["w"]) == (DEVICES, 40, 30)
    wide = jax.tree.broadcast(SPECS, get_state(state), is_leaf=lambda x: isinstance(x, P))
    assert get_state(specs) == wide
    with pytest.raises(ValueError, match=r"the mesh here has the axes \[\]; .* jax.set_mesh"):
        state_shardings(inner, PARAMS, P())
    placed = state_shardings(inner, PARAMS, jax.NamedSharding(mesh, P()))
    assert jax.tree.map(lambda sharding: sharding.spec, placed) == specs


def test_specs_may_be_over_two_axes_with_parameters_on_a_third():
    mesh = make_mesh(AxisType.Auto, (2, 2, 2), ("a", "b", "model"))
    tx = accumulate(K, INNER, reduce_axes=("b", "a"), average_args=("value",))
    rows = {"w": P("model", None), "b": P(), "scale": P()}
    with jax.set_mesh(mesh):
        specs = state_shardings(tx, PARAMS, rows)
    assert specs.grad_sum == {
        "w": P(("a", "b"), "model", None),
        "b": P(("a", "b")),
        "scale": P(("a", "b")),
    }
    assert (specs.weight, specs.arg_sums) == (P(("a", "b")), {"sum_of_value": P(("a", "b"))})
    assert specs.inner_state[0].mu == rows


def test_axes_that_are_not_there_are_refused(mesh):
    with pytest.raises(TypeError, match=r"`reduce_axes` must be names of mesh axes, got 3"):
        accumulate(2, INNER, reduce_axes=3)
    tx = accumulate(2, INNER, reduce_axes=("model",))
    with pytest.raises(ValueError, match=r"'model', but the mesh here has the axes \[\]"):
        tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"'model', but the mesh here has the axes \['data'\]"):
        make_programs(tx, mesh)[0](PARAMS)
    with jax.set_mesh(mesh):
        tx = accumulate(2, INNER, reduce_axes="data")
        state = tx.init(PARAMS)
        with pytest.raises(ValueError, match=r"'data', an Auto axis.*value_and_apply"):
            jax.jit(tx.update)(PARAMS, state, PARAMS)


def test_a_state_that_was_made_or_passed_otherwise_is_refused(mesh):
    tx = accumulate(K, INNER, reduce_axes="data")
    init, step = make_programs(tx, mesh)
    everywhere = SPECS._replace(weight=P(), grad_sum=P())
    once = jax.jit(
        jax.shard_map(
            lambda state, params: tx.update(vary(params), state, params)[1],
            mesh=mesh,
            in_specs=(everywhere, P()),
            out_specs=SPECS,
        )
    )
    with pytest.raises(ValueError, match=r"got `weight` of shape \(8,\) there"):
        once(init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"got `weight` of shape \(\) there; make it with `init`"):
        once(accumulate(K, INNER).init(PARAMS), PARAMS)
    more = jax.tree.map(lambda x: jnp.concatenate([x, x]), init(PARAMS).weight)
    with pytest.raises(ValueError, match=r"got `weight` of shape \(2,\) there"):
        step(PARAMS, init(PARAMS)._replace(weight=more), X[0], MASK[0])


def test_devices_that_would_not_release_together_are_refused(mesh):
    def some(step):
        return jnp.where(jax.lax.axis_index("data") > 2, 2, 3)

    for every_k, decide in ((3, lambda: jax.lax.axis_index("data") > 2), (some, lambda: None)):
        tx = accumulate(every_k, INNER, reduce_axes="data")

        def train_step(params, x, mask, tx=tx, decide=decide):
            grads = jax.grad(loss_fn)(vary(params), x, mask)
            return apply_gradients(tx, grads, tx.init(params), params, release=decide())[0]

        specs = P(), P("data"), P("data")
        step = jax.shard_map(train_step, mesh=mesh, in_specs=specs, out_specs=P())
        with pytest.raises(TypeError, match=r"`every_k` differs between the devices of \['data'\]"):
            jax.jit(step)(PARAMS, X[0], MASK[0])


def test_gradients_that_are_summed_already_are_refused(mesh):
    """Nothing may silently be scaled by the number of devices."""
    tx = accumulate(2, INNER, reduce_axes="data")

    def train_step(cast, params, x, mask):
        grads = jax.grad(loss_fn)(cast(params), x, mask)
        return apply_gradients(tx, grads, tx.init(params), params)[0]

    def run(cast, check_vma):
        step = functools.partial(train_step, cast)
        specs = P(), P("data"), P("data")
        options = {"in_specs": specs, "out_specs": P(), "check_vma": check_vma}
        return jax.jit(jax.shard_map(step, mesh=mesh, **options))

    message = r"gradient leaf \['b'\] does not vary over \['data'\]"
    with pytest.raises(TypeError, match=message):
        run(lambda params: params, True)(PARAMS, X[0], MASK[0])
    with pytest.raises(TypeError, match=f"{message}.*check_vma=False"):
        run(vary, False)(PARAMS, X[0], MASK[0])


def test_gradients_of_one_device_without_reduce_axes_are_refused(mesh):
    tx = accumulate(2, optax.sgd(0.1))

    def train_step(params, state, x, mask):
        grads = jax.grad(loss_fn)(vary(params), x, mask)
        return apply_gradients(tx, grads, state, params)

    specs = P(), P(), P("data"), P("data")
    step = jax.jit(jax.shard_map(train_step, mesh=mesh, in_specs=specs, out_specs=P()))
    with pytest.raises(TypeError, match=r"varies over \['data'\] of jax.shard_map.*`reduce_axes`"):
        step(PARAMS, tx.init(PARAMS), X[0], MASK[0])


def test_inner_may_reduce_the_gradients(mesh):
    """As in jax.pmap; sums that differ between devices are told so by the caller."""
    mean = optax.stateless(lambda grads, _: jax.lax.pmean(grads, "data"))
    tx = accumulate(2, optax.chain(mean, INNER))

    def train(params, x, mask):
        state = tx.init(params)
        state = state._replace(grad_sum=vary(state.grad_sum))
        for i in range(2):
            grads = jax.grad(loss_fn)(vary(params), x[i], mask[i])
            params, state = apply_gradients(tx, grads, state, params)
        return params

    specs = P(), P(None, "data"), P(None, "data")
    step = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=specs, out_specs=P()))
    whole = jnp.ones_like(MASK)
    params = step(PARAMS, X, whole)
    grads = [jax.grad(loss_fn)(PARAMS, X[i], whole[i]) for i in range(2)]
    mean_of_both = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    updates, _ = INNER.update(mean_of_both, INNER.init(PARAMS), PARAMS)
    assert_close(params, optax.apply_updates(PARAMS, updates))


# `jax.pmap`: gradients that are reduced before they are summed, or once per window.


def summed_loss(params, x, mask):
    return loss_fn(params, x, mask) * mask.sum()


def train_in_pmap(tx, gradients, mask=MASK):
    """Returns the parameters of all devices, and the bytes sent on every call and on a release."""

    def train_step(params, state, x, mask):
        grads, extra_args = gradients(params, x, mask)
        return apply_gradients(tx, grads, state, params, **extra_args)

    step = jax.pmap(train_step, axis_name="data")
    params = jax.tree.map(lambda p: jnp.broadcast_to(p, (DEVICES, *p.shape)), PARAMS)
    state = jax.pmap(tx.init, axis_name="data")(params)
    batches = [a.reshape(2 * K, DEVICES, -1, *a.shape[2:]) for a in (X, mask)]
    for x, m in zip(*batches, strict=True):
        params, state = step(params, state, x, m)
    np.testing.assert_array_equal(state.gradient_step, np.full(DEVICES, 2))
    program = step.lower(params, state, batches[0][0], batches[1][0]).compile()
    return params, *collectives(program)


def assert_all_close(params, expected):
    for i in range(DEVICES):
        assert_close(jax.tree.map(lambda p, i=i: p[i], params), expected)


def test_in_pmap_gradients_may_be_reduced_as_they_come():
    """The weight is that of all devices' rows, and so the same on all."""

    def gradients(params, x, mask):
        tokens = jax.lax.psum(mask.sum(), "data")
        grads = jax.lax.psum(jax.grad(summed_loss)(params, x, mask), "data")
        return jax.tree.map(lambda g: g / tokens, grads), {"weight": tokens}

    params, always, on_release = train_in_pmap(accumulate(K, INNER), gradients)
    assert_all_close(params, full_batches())
    assert (sum(always), on_release) == (BYTES + SCALAR_BYTES, [])


def test_in_pmap_means_of_as_many_rows_are_reduced_once_a_window():
    pmean = optax.stateless(lambda updates, _: jax.lax.pmean(updates, "data"))
    tx = accumulate(K, optax.chain(pmean, INNER))

    def gradients(params, x, mask):
        return jax.grad(loss_fn)(params, x, mask), {}

    mask = jnp.ones_like(MASK)
    params, always, on_release = train_in_pmap(tx, gradients, mask)
    assert (always, sum(on_release)) == ([], BYTES)
    alone, state = PARAMS, INNER.init(PARAMS)
    for x in X.reshape(2, -1, X.shape[-1]):
        grads = jax.grad(loss_fn)(alone, x, jnp.ones(len(x)))
        updates, state = INNER.update(grads, state, alone)
        alone = optax.apply_updates(alone, updates)
    assert_all_close(params, alone)


def mean_over_devices(axis):
    """Returns a link that divides the devices' sums by the number of their tokens."""

    def update(updates, state, params=None, *, tokens, **extra_args):
        del params, extra_args
        total = jnp.maximum(jax.lax.psum(tokens, axis), 1)
        return jax.tree.map(lambda u: u / total, jax.lax.psum(updates, axis)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def test_in_pmap_sums_over_tokens_are_reduced_once_a_window():
    """A window's mean of sums over its mean of tokens is its mean over tokens."""
    inner = optax.chain(mean_over_devices("data"), INNER)
    tx = accumulate(K, inner, average_args=("tokens",))

    def gradients(params, x, mask):
        return jax.grad(summed_loss)(params, x, mask), {"tokens": mask.sum()}

    params, always, on_release = train_in_pmap(tx, gradients)
    assert_all_close(params, full_batches())
    assert (always, sum(on_release)) == ([], BYTES + SCALAR_BYTES)


def test_reduce_axes_needs_types_that_pmap_has_not():
    tx = accumulate(K, INNER, reduce_axes="data")

    def gradients(params, x, mask):
        return jax.grad(loss_fn)(params, x, mask), {}

    message = re.compile(r"`reduce_axes`.*jax\.shard_map", re.DOTALL)
    with pytest.raises((TypeError, ValueError), match=message):
        train_in_pmap(tx, gradients)
