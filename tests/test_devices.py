"""Devices that share an optimizer: explicit sharding, ensembles, and pieces of a model."""

import functools

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from helpers.hlo import collectives
from helpers.meshes import DEVICES, make_mesh, needs_reshard, vary
from helpers.tokens import (
    BYTES,
    INNER,
    MASK,
    PARAMS,
    ROWS,
    SCALAR_BYTES,
    K,
    X,
    assert_close,
    explicit_step,
    full_batches,
    loss_fn,
    prepare,
    replicated,
)
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
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
import optaccum.flax


@pytest.fixture
def explicit():
    if not hasattr(jax, "reshard"):
        pytest.skip("needs a newer JAX")
    with jax.set_mesh(mesh := make_mesh(AxisType.Explicit)):
        yield mesh


def test_explicit_sharding_equals_the_full_batch_and_reduces_once(explicit):
    tx = accumulate(K, INNER, reduce_axes="data")
    params, place = replicated(explicit)
    state, step = tx.init(params), explicit_step(tx, loss_fn)
    types = jax.tree.map(jax.typeof, state)
    assert all(
        jax.typeof(x).sharding.spec.unreduced == {"data"} for x in jax.tree.leaves(state.grad_sum)
    )
    for x, mask in zip(X, MASK, strict=True):
        params, state = step(params, state, place(x), place(mask))
        assert jax.tree.map(jax.typeof, state) == types
    assert_close(params, full_batches())
    program = step.lower(params, state, place(X[0]), place(MASK[0])).compile()
    always, on_release = collectives(program)
    assert max(always, default=0) < PARAMS["w"].nbytes, "reduced on a hold too"
    assert on_release.count(BYTES) == 1


def test_sums_of_parameters_that_are_sharded_over_the_axis_stay_sharded(explicit):
    tx = accumulate(2, optax.sgd(1.0), reduce_axes="data")
    place = NamedSharding(explicit, P("data", None))
    params = {"w": jax.device_put(jnp.ones((16, 3)), place)}
    state, types = tx.init(params), jax.typeof(params["w"])
    assert jax.typeof(state.grad_sum["w"]) == types
    for value in (1.0, 3.0):
        grads = {"w": jax.device_put(jnp.full((16, 3), value), place)}
        params, state = jax.jit(functools.partial(apply_gradients, tx))(grads, state, params)
        assert jax.typeof(state.grad_sum["w"]) == types == jax.typeof(params["w"])
    np.testing.assert_array_equal(params["w"], np.full((16, 3), -1.0))


def transformer(params, tokens, mask):
    """Embedding, norm, attention, biased dense layers, and a head, on i32[batch, length]."""
    x = params["embed"].at[tokens].get(out_sharding=P("data", None, None))
    for layer in params["layers"]:
        h = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * layer["norm"]
        q, k, v = (h @ layer[name] for name in "qkv")
        scores = jnp.einsum("bid,bjd->bij", q, k) / 4
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        scores = jnp.where(causal, scores, -1e9)
        x = x + jnp.einsum("bij,bjd->bid", jax.nn.softmax(scores), v) @ layer["out"]
        x = x + jnp.tanh(x @ layer["up"] + layer["bias"]) @ layer["down"]
    logits = jax.nn.log_softmax(x[:, :-1] @ params["head"])
    targets = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
    losses = -jnp.sum(logits * targets, axis=-1)
    return jnp.sum(losses * mask[:, 1:]) / jnp.maximum(mask[:, 1:].sum(), 1)


def transformer_params(width=16, vocabulary=32):
    def weight(i, *shape):
        return jax.random.normal(jax.random.key(i), shape) * shape[0] ** -0.5

    layer = {name: weight(i, width, width) for i, name in enumerate(("q", "k", "v", "out"))}
    layer |= {"up": weight(5, width, 4 * width), "bias": jnp.zeros(4 * width)}
    layer |= {"down": weight(6, 4 * width, width), "norm": jnp.ones(width)}
    return {
        "embed": weight(7, vocabulary, width),
        "layers": [layer],
        "head": weight(8, width, vocabulary),
    }


def test_a_transformer_with_explicit_sharding_equals_the_full_batch(explicit):
    params = transformer_params()
    tokens = jax.random.randint(jax.random.key(1), (K, ROWS, 12), 0, 32)
    lengths = jnp.linspace(2, 12, ROWS).astype(int)
    mask = (jnp.arange(12) < lengths[:, None]).astype(jnp.float32)
    place = functools.partial(jax.device_put, device=NamedSharding(explicit, P("data")))

    def loss(params, tokens, mask):
        # A lookup is no matrix product: its table's gradient arrives reduced.
        return transformer(params, tokens, mask)

    def train_step(tx, params, state, tokens, mask):
        reduced = prepare(params) | {"embed": params["embed"]}
        grads = jax.grad(loss)(reduced, tokens, mask)
        return apply_gradients(tx, grads, state, params, weight=mask[:, 1:].sum())

    results = []
    for tx, batches in (
        (accumulate(K, INNER, reduce_axes="data"), list(tokens)),
        (accumulate(1, INNER), [tokens.reshape(-1, 12)]),
    ):
        new = jax.device_put(jax.tree.map(jnp.copy, params), NamedSharding(explicit, P()))
        state = tx.init(new)
        if len(batches) == 1:
            whole = place(batches[0]), place(jnp.tile(mask, (K, 1)))
            grads = jax.jit(jax.grad(loss))(new, *whole)
            new, state = jax.jit(functools.partial(apply_gradients, tx))(grads, state, new)
        else:
            step = jax.jit(functools.partial(train_step, tx), donate_argnums=(0, 1))
            for batch in batches:
                new, state = step(new, state, place(batch), place(mask))
        results.append(new)
    assert_close(*results)


def test_sums_of_gathered_parameters_are_scattered_once_a_window(explicit):
    """Parameters and moments divided, sums whole on each device: one reduction, no gathering."""
    tx = accumulate(2, optax.adam(0.1, eps=1e-2), reduce_axes="data")
    rows = NamedSharding(explicit, P("data", None))
    params = {"w": jax.device_put(PARAMS["w"], rows)}
    _, place = replicated(explicit)

    def gather(params):
        return jax.tree.map(lambda p: jax.reshard(p, P(None, None, reduced={"data"})), params)

    def init(params):
        sums = tx.init(gather(params)).grad_sum
        return tx.init(params)._replace(grad_sum=sums)

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)

    def step(params, state, x):
        return apply_gradients(tx, jax.grad(loss)(gather(params), x), state, params)

    state, step = jax.jit(init)(params), jax.jit(step, donate_argnums=(0, 1))
    assert jax.typeof(state.grad_sum["w"]).sharding.spec.unreduced == {"data"}
    assert jax.typeof(state.inner_state[0].mu["w"]) == jax.typeof(params["w"])
    types = jax.tree.map(jax.typeof, (params, state))
    program = step.lower(params, state, place(X[0])).compile()
    for x in X[:2]:
        params, state = step(params, state, place(x))
        assert jax.tree.map(jax.typeof, (params, state)) == types
    grads = jax.grad(loss)({"w": PARAMS["w"]}, X[:2].reshape(-1, 40))
    updates, _ = INNER.update(grads, INNER.init(grads), None)
    assert_close(params["w"], PARAMS["w"] + updates["w"])
    always, on_release = collectives(program)
    piece = PARAMS["w"].nbytes // DEVICES
    assert always == [piece], "the gathering of the parameters alone"
    assert max(on_release) == PARAMS["w"].nbytes
    # Without sums like that there is no silent reduction per microbatch.
    message = r"leaf \['w'\] is sharded as .*, but its sum .* as float32\[40@data,30\]; reshard"
    with pytest.raises(ValueError, match=message):
        step(params, tx.init(params), place(X[0]))


def test_a_nan_on_one_device_rejects_the_microbatch(explicit):
    tx = accumulate(K, INNER, reduce_axes="data", should_skip_update_fn=skip_not_finite)
    params, place = replicated(explicit)
    state, step = tx.init(params), explicit_step(tx, loss_fn)
    x = jnp.concatenate([X[:1], X[:1].at[0, 5].set(jnp.nan), X[1:]])
    mask = jnp.concatenate([MASK[:1], jnp.ones((1, ROWS)), MASK[1:]])
    for i in range(len(x)):
        params, state = step(params, state, place(x[i]), place(mask[i]))
    assert (int(state.skipped), int(state.gradient_step)) == (1, 2)
    assert_close(params, full_batches())

    def on_a_hold(tx):
        params, place = replicated(explicit)
        batch = place(X[0]), place(MASK[0])
        lowered = explicit_step(tx, loss_fn).lower(params, tx.init(params), *batch)
        return sum(collectives(lowered.compile())[0])

    without = on_a_hold(accumulate(K, INNER, reduce_axes="data"))
    assert on_a_hold(tx) == without + SCALAR_BYTES


def test_optax_cannot_judge_unreduced_gradients(explicit):
    tx = accumulate(2, INNER, reduce_axes="data", should_skip_update_fn=optax.skip_not_finite)
    params, place = replicated(explicit)
    refused = r"leaf \['w'\], which are unreduced .*optaccum.skip_not_finite"
    with pytest.raises(TypeError, match=refused):
        explicit_step(tx, loss_fn)(params, tx.init(params), place(X[0]), place(MASK[0]))


def test_unreduced_gradients_that_nobody_asked_for_are_refused(explicit):
    tx = accumulate(2, INNER)
    params, place = replicated(explicit)
    with pytest.raises(TypeError, match=r"leaf \['w'\] is unreduced over \['data'\]; name"):
        explicit_step(tx, loss_fn)(params, tx.init(params), place(X[0]), place(MASK[0]))


def test_gradients_that_are_reduced_already_are_refused(explicit):
    tx = accumulate(2, INNER, reduce_axes="data")
    params, place = replicated(explicit)
    grads = jax.grad(loss_fn)(params, place(X[0]), place(MASK[0]))
    with pytest.raises(TypeError, match=r"no gradient leaf is unreduced over \['data'\]"):
        apply_gradients(tx, grads, tx.init(params), params)


def test_gradients_that_are_sharded_otherwise_than_their_sums_are_refused(explicit):
    params, _ = replicated(explicit)
    grads = {**params, "w": jax.device_put(PARAMS["w"], NamedSharding(explicit, P("data", None)))}
    message = r"leaf \['w'\] is sharded as float32\[40@data,30\], but its sum .* float32\[40,30\]"
    tx = accumulate(2, INNER)
    with pytest.raises(ValueError, match=message):
        jax.jit(functools.partial(apply_gradients, tx))(grads, tx.init(params), params)
    message = r"leaf \['b'\] is sharded as float32\[30\]{U:data}, but its sum .* as float32\[30\]"
    step = explicit_step(accumulate(2, INNER, reduce_axes="data"), loss_fn)
    _, place = replicated(explicit)
    with pytest.raises(ValueError, match=message):
        step(params, tx.init(params), place(X[0]), place(MASK[0]))


@pytest.mark.parametrize("n", [1, 4])
def test_value_and_grad_reduces_once(explicit, n):
    step = value_and_grad(
        loss_fn,
        num_microbatches=n,
        batch_argnums=(1, 2),
        weight_fn=lambda params, x, mask: mask.sum(),
        reduce_axes="data",
    )
    params, place = replicated(explicit)
    x, mask = jnp.tile(X[0], (4, 1)), jnp.concatenate(MASK[:4])
    batch = place(x), place(mask)
    compiled = jax.jit(lambda params, *batch: step(prepare(params), *batch)).lower(params, *batch)
    compiled = compiled.compile()
    loss, grads = compiled(params, *batch)
    assert jax.tree.map(jax.typeof, grads) == jax.tree.map(jax.typeof, params)
    assert_close((loss, grads), jax.value_and_grad(loss_fn)(PARAMS, x, mask))
    large = [size for size in collectives(compiled)[0] if size >= PARAMS["w"].nbytes]
    assert len(large) == 1, "reduced in the loop"
    with pytest.raises(TypeError, match=r"no gradient leaf is unreduced over \['data'\]"):
        step(params, *batch)


def test_updates_of_a_hold_outside_jit_have_the_type_of_the_release(explicit):
    tx = accumulate(2, optax.sgd(1.0), reduce_axes="data")
    params, place = replicated(explicit)
    grads = jax.jit(lambda p, *batch: jax.grad(loss_fn)(prepare(p), *batch))(
        params, place(X[0]), place(MASK[0])
    )
    state = tx.init(params)
    held, state = tx.update(grads, state, params)
    released, state = tx.update(grads, state, params)
    assert state.released
    assert jax.tree.map(jax.typeof, held) == jax.tree.map(jax.typeof, released)
    assert not any(jnp.any(x) for x in jax.tree.leaves(held))


def test_unreduced_sums_may_be_sent_in_bfloat16(explicit):
    params, place = replicated(explicit)
    x, mask = jnp.tile(X[0], (4, 1)), jnp.concatenate(MASK[:4])
    step = value_and_grad(
        loss_fn,
        num_microbatches=4,
        batch_argnums=(1, 2),
        weight_fn=lambda params, x, mask: mask.sum(),
        reduce_axes="data",
        reduce_dtype=jnp.bfloat16,
    )
    _, grads = jax.jit(lambda params, *batch: step(prepare(params), *batch))(
        params, place(x), place(mask)
    )
    expected = jax.grad(loss_fn)(PARAMS, x, mask)["w"]
    off = jnp.abs(grads["w"] - expected).max()
    # A rounding of each of 8 sums, and one for each of 7 additions.
    assert 1e-5 * jnp.abs(expected).max() < off < 15 * 2**-8 * jnp.abs(expected).max()


def test_state_shardings_gives_what_init_gives(explicit):
    tx = optax.chain(optax.clip(1.0), accumulate(K, INNER, reduce_axes="data"))
    params, _ = replicated(explicit)
    params["w"] = jax.device_put(params["w"], NamedSharding(explicit, P("data", None)))
    shardings = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, tx.init(params))
    spec = get_state(shardings).grad_sum["b"].spec
    assert (spec.unreduced, get_state(shardings).weight.spec) == ({"data"}, P())


# What devices must agree on, and what is refused as no part.


@pytest.fixture
def mesh():
    return make_mesh(AxisType.Auto)


def test_members_of_an_ensemble_judge_their_own_weights(mesh):
    """Without `reduce_axes` a weight that is none rejects its device's microbatch."""
    tx = accumulate(2, optax.sgd(1.0))

    def train(params, weights):
        state = tx.init(params)
        for i in range(2):
            grads = jnp.ones_like(params)
            params, state = apply_gradients(tx, grads, state, params, weight=weights[0, i])
        return params

    bad = jnp.array([jnp.inf, jnp.nan, -0.5])
    weights = jnp.ones((DEVICES, 2)).at[1:4, 0].set(bad)
    mapped = jax.shard_map(train, mesh=mesh, in_specs=(P("data"),) * 2, out_specs=P("data"))
    params = jax.jit(mapped)(jnp.zeros((DEVICES, 1)), weights)
    np.testing.assert_array_equal(params[:, 0], [-1, 0, 0, 0, -1, -1, -1, -1])


@pytest.mark.parametrize("release", [None, True])
def test_devices_with_pieces_of_the_parameters_reject_together(release):
    """A NaN in the columns of one device rejects the microbatch for the other columns too."""
    mesh, columns = make_mesh(AxisType.Auto, (4, 2), ("data", "model")), P(None, "model")
    tx = accumulate(1, optax.sgd(0.1), reduce_axes="data", should_skip_update_fn=skip_not_finite)

    def train(params, scale):
        state = tx.init(params)
        for i in range(2):
            grads = vary(jnp.ones_like(params)) * jnp.where(i == 0, scale[0], 1.0)
            params, state = apply_gradients(tx, grads, state, params, release=release)
        return params, state.skipped

    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=(columns, P("model")), out_specs=(columns, P())
    )
    params, skipped = jax.jit(mapped)(jnp.zeros((2, 4)), jnp.array([1.0, jnp.nan]))
    np.testing.assert_allclose(params, np.full((2, 4), -0.1), rtol=1e-6)
    assert int(skipped) == 1


def test_members_of_an_ensemble_may_have_several_devices():
    """Weights vary over the members too, of which each closes its own windows."""
    mesh = make_mesh(AxisType.Auto, (2, 4), ("member", "data"))
    tx = accumulate(2, optax.sgd(1.0), reduce_axes="data")

    def train(params, weights):
        params, state = params[0], tx.init(params[0])
        for i in range(2):
            grads = vary(jnp.ones_like(params)) * (i + 1)
            params, state = apply_gradients(tx, grads, state, params, weight=weights[0, 0, i])
        return params[None]

    weights = np.ones((2, 4, 2), np.float32)
    weights[1] = 0  # of this member's windows none counts
    weights[0, 0, 1] = 5
    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=(P("member"), P("member", "data")), out_specs=P("member")
    )
    params = jax.jit(mapped)(jnp.zeros((2, 3)), weights)
    np.testing.assert_allclose(params[0], np.full(3, -(4 * 1 + 8 * 2) / 12), rtol=1e-6)
    np.testing.assert_array_equal(params[1], np.zeros(3))


def test_parameters_that_are_divided_over_the_axis_are_refused(mesh):
    """Sums of pieces of different devices would be added to each other."""
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")
    rows = {"experts": P("data")}
    params = {"experts": jnp.ones((DEVICES, 2))}
    message = r"leaf \['experts'\] varies over \['data'\] of `reduce_axes`.*second `accumulate`"
    with pytest.raises(TypeError, match=message):
        jax.shard_map(tx.init, mesh=mesh, in_specs=(rows,), out_specs=P())(params)
    step = value_and_grad(
        lambda params, x: jnp.mean(x @ params["experts"].T),
        num_microbatches=2,
        reduce_axes="data",
    )
    specs = rows, P("data")
    with pytest.raises(TypeError, match=message):
        jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())(params, jnp.ones((16, 2)))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"sharded as .* over \['data'\]"):
        state_shardings(tx, params, rows)


def test_an_axis_of_the_rows_that_was_not_named_is_refused():
    """JAX sums over it on its own, and nobody would divide."""
    mesh = make_mesh(AxisType.Auto, (2, 4), ("replica", "data"))
    x = jnp.arange(64.0).reshape(16, 4)

    def loss_fn(w, x):
        return jnp.mean((x @ w) ** 2)

    def run(fun, axes):
        step = value_and_grad(fun, num_microbatches=2, reduce_axes=axes)
        specs = P(), P(("replica", "data"))
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P()))(w, x)

    w = jnp.ones(4)
    with pytest.raises(TypeError, match=r"varies over \['replica'\].*`reduce_axes` too"):
        run(loss_fn, "data")
    expected = jax.value_and_grad(loss_fn)(w, x)
    averaged = run(lambda w, x: jax.lax.pmean(loss_fn(w, x), "replica"), "data")
    for actual in (run(loss_fn, ("replica", "data")), averaged):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_carried_is_each_devices_own(mesh, n, weighted):
    def loss_fn(w, stats, x):
        return jnp.mean((x @ w) ** 2), ({"mean": (stats["mean"] + x.mean()) / 2}, ())

    step = value_and_grad(
        loss_fn,
        has_aux=True,
        num_microbatches=n,
        batch_argnums=2,
        carry_argnum=1,
        weight_fn=(lambda w, stats, x: jnp.sum(x > 0)) if weighted else None,
        reduce_axes="data",
    )

    def local(w, stats, x):
        (loss, (stats, _)), grads = step(w, stats, x)
        return loss, stats["mean"][None], jax.lax.pmean(stats["mean"], "data"), grads

    x = jnp.arange(1, 33.0).reshape(16, 2)
    out_specs = P(), P("data"), P(), P()
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=out_specs)
    _, own, mean, _ = jax.jit(mapped)(jnp.ones(2), {"mean": jnp.zeros(())}, x)
    expected = np.zeros(DEVICES)
    for i in range(n):
        expected = (expected + x.reshape(DEVICES, 2, 2)[:, i::n].mean(axis=(1, 2))) / 2
    np.testing.assert_allclose(own, expected, rtol=1e-6)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-6)


def test_a_collection_to_overwrite_is_refused(mesh):
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")
    params = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(())}}

    def step(params):
        state = optaccum.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
        return state.apply_gradients(grads=vary(params)).params

    with pytest.raises(ValueError, match=rf"'{OVERWRITE_WITH_GRADIENT}'.*`reduce_axes`"):
        jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P()))(params)


def test_specs_on_an_explicit_mesh_are_those_of_shard_map():
    """They are those of `jax.shard_map`, and an `init` that reshards is none of its business."""
    mesh = make_mesh(AxisType.Explicit)
    reshard = getattr(jax, "reshard", None) or jax.sharding.reshard
    plain = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: reshard(p, P("data")), params),
        lambda updates, state, params=None: (updates, state),
    )
    params = jnp.ones((16, 2))
    with jax.set_mesh(mesh):
        assert state_shardings(plain, params, P("data")) == P("data")
        tx = accumulate(2, optax.sgd(0.1, momentum=0.9), reduce_axes="data")
        specs = state_shardings(tx, params, P())
    assert (specs.grad_sum, specs.weight) == (P("data"), P("data"))
    assert specs.inner_state[0].trace == P()


@needs_reshard
def test_complex_parameters_are_refused():
    mesh = make_mesh(AxisType.Explicit)
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")
    with jax.set_mesh(mesh):
        params = {"c": jax.device_put(jnp.ones(2, jnp.complex64), NamedSharding(mesh, P()))}
        with pytest.raises(TypeError, match=r"leaf \['c'\] is complex, and JAX cannot"):
            tx.init(params)


@needs_reshard
def test_the_state_of_parameters_that_wait_to_be_reduced_waits_too():
    mesh = make_mesh(AxisType.Explicit)
    tx = accumulate(2, optax.sgd(0.1, momentum=0.9), reduce_axes="data")
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, P()))
        params = jax.reshard(params, P(None, None, reduced={"data"}))
        shardings = state_shardings(tx, params)
        state = jax.jit(tx.init)(params)
    assert (
        shardings.grad_sum.spec.unreduced == {"data"} == shardings.inner_state[0].trace.spec.reduced
    )
    assert jax.typeof(state.grad_sum).sharding.spec.unreduced == {"data"}


@pytest.mark.skipif(hasattr(jax, "reshard"), reason="this JAX knows unreduced arrays")
def test_a_jax_that_cannot_compute_with_unreduced_arrays_is_named():
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")
    message = r"'data', an Explicit axis.*update JAX"
    with jax.set_mesh(make_mesh(AxisType.Explicit)), pytest.raises(ValueError, match=message):
        tx.init(jnp.ones(2))
