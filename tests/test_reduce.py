"""Gradients that are parts of a sum over devices are accumulated as parts, and reduced once."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest
from support import STEPS

from optaccum import AccumulateState, accumulate, apply_gradients

DEVICES, K, ROWS = 8, 3, 16
needs_reshard = pytest.mark.skipif(not hasattr(jax, "reshard"), reason="needs a newer JAX")
SPECS = AccumulateState(
    mini_step=P(),
    gradient_step=P(),
    released=P(),
    skipped=P(),
    weight=P("data"),
    grad_sum=P("data"),
    arg_sums=P("data"),
    skip_state=P(),
    inner_state=P(),
)
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"w": jax.random.normal(KEYS[0], (40, 30)), "b": jnp.zeros(30), "scale": jnp.ones(())}
X = jax.random.normal(KEYS[1], (2 * K, ROWS, 40))
# Devices hold rows of very different numbers of tokens, some of them none.
MASK = (jax.random.uniform(KEYS[2], (2 * K, ROWS)) > jnp.linspace(0, 1, ROWS)).astype(jnp.float32)
INNER = optax.adam(0.1, eps=1e-2)


def loss_fn(params, x, mask):
    y = jnp.tanh(x @ params["w"] / 6 + params["b"]) * params["scale"]
    return jnp.sum(mask[:, None] * (y - 0.3) ** 2) / jnp.maximum(mask.sum(), 1) / 30


def full_batches(inner=INNER, windows=((0, K), (K, 2 * K)), use_grad_mean=True):
    """Returns the parameters after a step of `inner` on each window, as one batch."""
    params, state = PARAMS, inner.init(PARAMS)
    for start, end in windows:
        x, mask = X[start:end].reshape(-1, 40), MASK[start:end].reshape(-1)
        grads = jax.grad(loss_fn)(params, x, mask)
        if not use_grad_mean:
            grads = optax.tree.scale(mask.sum(), grads)
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(actual, expected):
    # Three microbatches on 8 devices: sums in another order; a step of 0.1 divided by |g| + eps.
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5), actual, expected
    )


def vary(tree):
    cast = (
        functools.partial(jax.lax.pcast, to="varying")
        if hasattr(jax.lax, "pcast")
        else jax.lax.pvary
    )
    return jax.tree.map(lambda x: cast(x, "data"), tree)


@pytest.fixture
def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture
def explicit():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield mesh


def make_programs(tx, mesh, step_name="apply_gradients", **extra_args):
    """Returns `init` and the jitted training step inside `jax.shard_map`."""
    one_step = STEPS[step_name](tx)

    def train_step(params, state, x, mask):
        value, grads = jax.value_and_grad(loss_fn)(vary(params), x, mask)
        extra = {"weight": mask.sum(), "value": value, **extra_args}
        return one_step(params, state, grads, **extra)

    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=SPECS)
    data = P("data")
    step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(P(), SPECS, data, data), out_specs=(P(), SPECS)
    )
    return jax.jit(init), jax.jit(step, donate_argnums=(0, 1))


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
    np.testing.assert_allclose(state.arg_sums["value"].sum() / state.weight.sum(), value, rtol=1e-5)


def test_the_mean_over_devices_is_not_the_mean_over_tokens(mesh):
    tx = accumulate(K, INNER)

    def train_step(params, state, x, mask):
        grads = jax.lax.pmean(jax.grad(loss_fn)(vary(params), x, mask), "data")
        return apply_gradients(tx, grads, state, params, weight=jax.lax.psum(mask.sum(), "data"))

    data = P("data")
    step = jax.shard_map(train_step, mesh=mesh, in_specs=(P(), P(), data, data), out_specs=P())
    params, _ = train((tx.init, jax.jit(step)))
    assert np.max(np.abs(params["w"] - full_batches()["w"])) > 1e-3


def test_the_sum_and_a_window_of_one(mesh):
    tx = accumulate(K, optax.sgd(0.01), reduce_axes=("data",), use_grad_mean=False)
    params, _ = train(make_programs(tx, mesh))
    assert_close(params, full_batches(optax.sgd(0.01), use_grad_mean=False))
    one = accumulate(1, INNER, reduce_axes=("data",))
    params, _ = train(make_programs(one, mesh))
    assert_close(params, full_batches(windows=[(i, i + 1) for i in range(2 * K)]))


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


def test_scan_inside_shard_map(mesh):
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


def test_a_nan_on_one_device_rejects_the_microbatch_on_all(mesh):
    tx = accumulate(K, INNER, reduce_axes="data", should_skip_update_fn=optax.skip_not_finite)
    x = jnp.concatenate([X[:1], X[:1].at[0, 5].set(jnp.nan), X[1:]])
    mask = jnp.concatenate([MASK[:1], jnp.ones((1, ROWS)), MASK[1:]])
    params, state = train(make_programs(tx, mesh), x, mask)
    assert (int(state.skipped), int(state.gradient_step)) == (1, 2)
    assert_close(params, full_batches())
    assert state.skip_state["should_skip"].shape == ()


@pytest.mark.parametrize("bad", [jnp.nan, -1.0, jnp.inf])
def test_what_is_no_weight_on_one_device_counts_nothing_there(mesh, bad):
    tx = accumulate(1, INNER, reduce_axes="data")

    def train_step(params, state, x, mask):
        grads = jax.grad(loss_fn)(vary(params), x, mask)
        weight = jnp.where(jax.lax.axis_index("data") == 2, bad, mask.sum())
        return apply_gradients(tx, grads, state, params, weight=weight)

    data = P("data")
    step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(P(), SPECS, data, data), out_specs=(P(), SPECS)
    )
    init, _ = make_programs(tx, mesh)
    params, state = jax.jit(step)(PARAMS, init(PARAMS), X[0], MASK[0])
    without = MASK[0].at[4:6].set(0)
    expected = jax.grad(loss_fn)(PARAMS, X[0], without)
    updates, _ = INNER.update(expected, INNER.init(PARAMS), PARAMS)
    assert_close(params, optax.apply_updates(PARAMS, updates))
    assert (bool(state.released), int(state.skipped)) == (True, 0)


def test_a_window_without_weight_is_dropped_on_all_devices(mesh):
    tx = accumulate(K, INNER, reduce_axes="data")
    x, mask = jnp.concatenate([X, X]), jnp.concatenate([jnp.zeros_like(MASK), MASK])
    params, state = train(make_programs(tx, mesh), x, mask)
    assert_close(params, full_batches())
    assert int(state.gradient_step) == 2


def collectives(text):
    """Returns the elements that each all-reduce of a compiled program has."""
    shapes = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter|all-gather)(?:-start)?\(", text)
    return [
        sum(
            int(np.prod([int(n) for n in dims.split(",") if n]))
            for dims in re.findall(r"\w+\[([\d,]*)\]", shape)
        )
        for shape in shapes
    ]


SIZE = sum(x.size for x in jax.tree.leaves(PARAMS))


@pytest.mark.parametrize("k", [4, 16])
def test_shard_map_reduces_once_a_window(mesh, k):
    tx = accumulate(k, INNER, reduce_axes="data")

    def compiled(**extra_args):
        init, step = make_programs(tx, mesh, **extra_args)
        arguments = PARAMS, init(PARAMS), X[0], MASK[0]
        return step.lower(*arguments).compile()

    counting: Any = compiled()
    # The gradients, and before them the weight that says whether there is something to divide by.
    assert sorted(collectives(counting.as_text())) == [1, SIZE]
    entry = counting.as_text().partition("\nENTRY")[2]
    assert collectives(entry) == [], "reduced on a hold too"
    assert collectives(compiled(release=False).as_text()) == []
    assert sum(collectives(compiled(release=True).as_text())) == SIZE + 1


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
        program: Any = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
        return program.memory_analysis().temp_size_in_bytes / (4 * 4 * 64 * 64)

    assert compiled(release=False) < 0.02
    assert compiled() < 1.1


def prepare(params):
    """Parameters of matrix products, whose gradients need not be reduced."""
    return jax.tree.map(
        lambda p: jax.reshard(p, P(*[None] * p.ndim, reduced={"data"})) if p.ndim > 1 else p, params
    )


def explicit_step(tx, loss, mesh):
    def train_step(params, state, *batch):
        grads = jax.grad(loss)(prepare(params), *batch)
        return apply_gradients(tx, grads, state, params, weight=batch[-1].sum())

    return jax.jit(train_step, donate_argnums=(0, 1))


@needs_reshard
def test_explicit_sharding_equals_the_full_batch_and_reduces_once(explicit):
    tx = accumulate(K, INNER, reduce_axes="data")
    place = functools.partial(jax.device_put, device=NamedSharding(explicit, P("data")))
    params = jax.device_put(jax.tree.map(jnp.copy, PARAMS), NamedSharding(explicit, P()))
    state, step = tx.init(params), explicit_step(tx, loss_fn, explicit)
    types = jax.tree.map(jax.typeof, state)
    assert all(
        jax.typeof(x).sharding.spec.unreduced == {"data"} for x in jax.tree.leaves(state.grad_sum)
    )
    for x, mask in zip(X, MASK, strict=True):
        params, state = step(params, state, place(x), place(mask))
        assert jax.tree.map(jax.typeof, state) == types
    assert_close(params, full_batches())
    program: Any = step.lower(params, state, place(X[0]), place(MASK[0])).compile()
    text = program.as_text()
    entry = text.partition("\nENTRY")[2]
    assert max(collectives(entry), default=0) < PARAMS["w"].size, "reduced on a hold too"
    assert collectives(text).count(SIZE) == 1


@needs_reshard
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


@needs_reshard
def test_a_transformer_with_explicit_sharding(explicit):
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
            grads = jax.grad(loss)(new, place(batches[0]), place(jnp.tile(mask, (K, 1))))
            new, state = apply_gradients(tx, grads, state, new)
        else:
            step = jax.jit(functools.partial(train_step, tx), donate_argnums=(0, 1))
            for batch in batches:
                new, state = step(new, state, place(batch), place(mask))
        results.append(new)
    assert_close(*results)


def test_bad_axes(mesh):
    with pytest.raises(TypeError, match=r"`reduce_axes` must be names of mesh axes, got 3"):
        accumulate(2, INNER, reduce_axes=3)
    tx = accumulate(2, INNER, reduce_axes=("model",))
    with pytest.raises(ValueError, match=r"'model', but the mesh here has the axes \[\]"):
        tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"'model', but the mesh here has the axes \['data'\]"):
        make_programs(tx, mesh)[0](PARAMS)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'data', an Auto axis"):
        jax.jit(accumulate(2, INNER, reduce_axes="data").init)(PARAMS)


def test_gradients_that_are_summed_already(mesh):
    """Nothing may silently be scaled by the number of devices."""
    tx = accumulate(2, INNER, reduce_axes="data")

    def train_step(cast, params, x, mask):
        grads = jax.grad(loss_fn)(cast(params), x, mask)
        return apply_gradients(tx, grads, tx.init(params), params)[0]

    def run(cast, check_vma):
        step = functools.partial(train_step, cast)
        specs = P(), P("data"), P("data")
        return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)

    message = r"gradient leaf \['b'\] does not vary over \['data'\]"
    with pytest.raises(TypeError, match=message):
        run(lambda params: params, True)(PARAMS, X[0], MASK[0])
    with pytest.raises(TypeError, match=f"{message}.*check_vma=False"):
        run(vary, False)(PARAMS, X[0], MASK[0])


@needs_reshard
def test_unreduced_gradients_cannot_be_judged(explicit):
    tx = accumulate(2, INNER, reduce_axes="data", should_skip_update_fn=optax.skip_not_finite)
    params = jax.device_put(PARAMS, NamedSharding(explicit, P()))
    batch = (jax.device_put(a[0], NamedSharding(explicit, P("data"))) for a in (X, MASK))
    with pytest.raises(TypeError, match=r"cannot look at gradient leaf \['w'\].*shard_map"):
        explicit_step(tx, loss_fn, explicit)(params, tx.init(params), *batch)


@needs_reshard
def test_unreduced_gradients_that_nobody_asked_for(explicit):
    tx = accumulate(2, INNER)
    params = jax.device_put(PARAMS, NamedSharding(explicit, P()))
    batch = (jax.device_put(a[0], NamedSharding(explicit, P("data"))) for a in (X, MASK))
    with pytest.raises(TypeError, match=r"leaf \['w'\] waits to be reduced over \['data'\]; name"):
        explicit_step(tx, loss_fn, explicit)(params, tx.init(params), *batch)
