"""`reduce_axes` in a plain `jax.jit`: each device adds up the gradients of its rows."""

import functools

from flax import nnx
from helpers.hlo import collectives
from helpers.meshes import DEVICES, bytes_on_first, make_mesh, named
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
    microbatched,
    state_shardings,
    value_and_apply,
    value_and_grad,
    window_metrics,
)
from optaccum.flax import Optimizer, TrainState

K, ROWS, LENGTH, VOCABULARY, WIDTH = 3, 16, 6, 16, 8
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "table": jax.random.normal(KEYS[0], (VOCABULARY, WIDTH)),
    "layers": {
        "a": jax.random.normal(KEYS[1], (4, WIDTH, 32)) * 0.3,
        "b": jax.random.normal(KEYS[2], (4, 32, WIDTH)) * 0.3,
    },
    "scale": jnp.ones(WIDTH),
}
IDS = jax.random.randint(KEYS[3], (2 * K, ROWS, LENGTH), 0, VOCABULARY)
# Devices hold rows of very different numbers of tokens, some of them none.
MASK = (jnp.arange(LENGTH) < (jnp.arange(2 * K * ROWS) % (LENGTH + 1))[:, None]).astype(jnp.float32)
BATCHES = [{"ids": IDS[i], "mask": MASK.reshape(2 * K, ROWS, LENGTH)[i]} for i in range(2 * K)]
WHOLE = {"ids": IDS.reshape(-1, LENGTH), "mask": MASK}
BYTES = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
SPECS = {  # of a model that is divided over "model"
    "table": P(None, "model"),
    "layers": {"a": P(None, None, "model"), "b": P(None, "model", None)},
    "scale": P(),
}


def loss_fn(params, batch):
    """A language model whose layers are scanned, and whose table is looked up and tied."""

    def layer(h, w):
        return h + jnp.tanh(h @ w["a"]) @ w["b"], None

    h = lax.scan(jax.checkpoint(layer), params["table"][batch["ids"]], params["layers"])[0]
    logits = (h * params["scale"]) @ params["table"].T
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["ids"])
    return jnp.sum(losses * batch["mask"]) / jnp.maximum(batch["mask"].sum(), 1)


def tokens(params, batch):
    return batch["mask"].sum()


def assert_close(found, expected, rtol=1e-5):
    # Sums of some 500 terms in float32, in another order; gradients are of order 1.
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@pytest.fixture(params=[(DEVICES,), (4, 2)], ids=["data", "data and model"])
def mesh(request):
    names = ("data", "model")[: len(request.param)]
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto, request.param, names)):
        yield mesh


def place(mesh, specs=None):
    """Returns a copy of the parameters on the mesh, divided over "model" if it has this axis."""
    specs = specs or (SPECS if "model" in mesh.axis_names else P())
    shardings = jax.tree.broadcast(named(mesh, specs), PARAMS)
    return jax.device_put(jax.tree.map(jnp.copy, PARAMS), shardings)


def rows(mesh, batch):
    return jax.device_put(batch, named(mesh, P("data")))


@pytest.mark.parametrize("n", [1, 3])
def test_a_batch_in_one_call_equals_the_full_batch_and_reduces_once(mesh, n):
    step = value_and_grad(loss_fn, num_microbatches=n, weight_fn=tokens, reduce_axes="data")
    args = place(mesh), rows(mesh, WHOLE)
    compiled = jax.jit(step).lower(*args).compile()
    found = jax.block_until_ready(compiled(*args))
    assert_close(found, jax.jit(jax.value_and_grad(loss_fn))(PARAMS, WHOLE))
    if mesh.axis_names == ("data",):
        assert sum(collectives(compiled)[0]) <= BYTES + 8  # and the loss, and the weight
    if n > 1:  # outside `jax.jit`
        assert_close(jax.block_until_ready(step(*args)), found)


def test_it_is_right_without_weights_and_with_sums():
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        args = place(mesh), rows(mesh, {"ids": WHOLE["ids"], "mask": jnp.ones_like(MASK)})
        expected = jax.block_until_ready(jax.jit(jax.value_and_grad(loss_fn))(*args))
        mean = value_and_grad(loss_fn, num_microbatches=3, reduce_axes="data")
        assert_close(jax.jit(mean)(*args), expected)

        def total(params, batch):
            return loss_fn(params, batch) * batch["mask"].sum()

        step = value_and_grad(
            total, num_microbatches=3, weight_fn=tokens, loss_reduction="sum", reduce_axes="data"
        )
        assert_close(jax.jit(step)(*args), expected)


def test_the_last_microbatch_may_run_after_the_scan():
    def fun(params, batch):
        return loss_fn(params, batch), (batch["ids"].sum(), 3)

    options = {"has_aux": True, "weight_fn": tokens, "reduce_axes": "data"}
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        args = place(mesh), rows(mesh, WHOLE)
        for n in (1, 3):
            step = functools.partial(value_and_grad, fun, num_microbatches=n, **options)
            expected = jax.block_until_ready(jax.jit(step())(*args))
            found = jax.jit(step(overlap_reduction=True))(*args)
            assert_close(found, expected, 1e-6)
    with pytest.raises(ValueError, match="`overlap_reduction` needs `reduce_axes`"):
        value_and_grad(fun, num_microbatches=2, overlap_reduction=True)


def test_sums_may_be_sent_in_bfloat16():
    window = {"ids": IDS[:K].reshape(-1, LENGTH), "mask": MASK[: K * ROWS]}
    expected = jax.grad(loss_fn)(PARAMS, window)
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        options = {"reduce_axes": "data", "reduce_dtype": jnp.bfloat16}
        args = place(mesh), rows(mesh, window)
        step = value_and_grad(loss_fn, num_microbatches=3, weight_fn=tokens, **options)
        manual = jax.shard_map(step, in_specs=(P(), P("data")), out_specs=P())
        tx = accumulate(K, optax.sgd(1.0), **options)
        by_loss = jax.jit(value_and_apply(tx, loss_fn, weight_fn=tokens))
        _, params, state = run(by_loss, args[0], tx.init(args[0]), BATCHES[:K])
        found = [jax.block_until_ready(jax.jit(way)(*args))[1] for way in (step, manual)]
        found.append(jax.tree.map(jnp.subtract, PARAMS, params))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.grad_sum))
    for grads in found:
        for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
            assert g.dtype == jnp.float32
            # A rounding of each of 8 sums, and one for each of 7 additions, 2**-8 each.
            np.testing.assert_allclose(g, e, rtol=0, atol=15 * 2**-8 * float(jnp.abs(e).max()))
            assert (jnp.abs(g - e) > 1e-5 * jnp.abs(e)).any()  # something was rounded
    with pytest.raises(ValueError, match=r"`reduce_dtype` .* needs `reduce_axes`"):
        accumulate(2, optax.sgd(0.1), reduce_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="overflow in `reduce_dtype` float16; use bfloat16"):
        accumulate(2, optax.sgd(0.1), reduce_axes="data", reduce_dtype=jnp.float16)
    with pytest.raises(TypeError, match=r"`reduce_dtype` .*int8.* is not a floating dtype"):
        value_and_grad(loss_fn, num_microbatches=2, reduce_axes="data", reduce_dtype=jnp.int8)


def test_stacked_microbatches_may_be_counted_when_the_program_runs():
    def fun(params, batch, count):
        return loss_fn(params, batch)

    options = {
        "batch_layout": "stacked",
        "weight_fn": lambda params, batch, _: tokens(params, batch),
    }
    step = functools.partial(
        value_and_grad, fun, num_microbatches=lambda params, batch, count: count, **options
    )
    stacked = {"ids": IDS, "mask": MASK.reshape(2 * K, ROWS, LENGTH)}
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        args = place(mesh), jax.device_put(stacked, named(mesh, P(None, "data")))
        here = jax.jit(step(reduce_axes="data"))
        for count in (0, 2, 2 * K):
            assert_close(here(*args, count), jax.jit(step())(PARAMS, stacked, count))
        assert here._cache_size() == 1


def test_what_devices_return_is_stacked_and_their_keys_differ():
    def fun(params, batch, key, scale, *, extra):
        noise = jax.random.normal(key, batch["ids"].shape[:1])
        aux = {"noise": noise, "extra": extra.sum(), "scale": scale}
        return loss_fn(params, batch), aux

    step = value_and_grad(
        fun,
        has_aux=True,
        num_microbatches=3,
        batch_argnames="extra",
        batch_argnums=1,
        rng_argnums=2,
        weight_fn=lambda params, batch, key, scale, *, extra: extra.sum(),
        reduce_axes="data",
    )
    count = len(MASK)
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        args = place(mesh), WHOLE, jax.random.key(1), 3.0
        (_, aux), _ = jax.jit(step)(*args, extra=np.arange(count))
    assert aux["noise"].shape == (3, DEVICES, count // 3 // DEVICES)
    assert len(np.unique(aux["noise"])) == count
    assert aux["extra"].shape == aux["scale"].shape == (3, DEVICES)
    # Microbatch i of device j holds every third of its rows.
    expected = np.arange(count).reshape(DEVICES, -1, 3).sum(1).T
    np.testing.assert_array_equal(aux["extra"], expected)


OPTIONS = {
    "plain": {},
    "sums of gradients": {"use_grad_mean": False},
    "sums of losses": {"loss_reduction": "sum"},
    "skipped": {"should_skip_update_fn": optax.skip_not_finite},
    "metrics": {"metrics": ("value",)},
    "averages": {"average_args": ("value",)},
}


def test_extra_arguments_count_once():
    """They are those of all rows, not of each device."""
    kinds = {"value": "mean", "load": "sum", "logit": "max", "accuracy": "ratio"}
    found = []
    for axes in ((), "data"):
        with jax.set_mesh(make_mesh(AxisType.Auto)):
            tx = accumulate(2, optax.sgd(0.1), metrics=kinds, reduce_axes=axes)
            params, state = PARAMS, tx.init(PARAMS)
            step = jax.jit(value_and_apply(tx, loss_fn, weight_fn=tokens))
            for i, batch in enumerate(BATCHES[:3]):
                extra = {"load": 2.0 + i, "logit": -3.0 - i, "accuracy": (1.0 + i, 4.0)}
                _, params, state = jax.block_until_ready(step(params, state, batch, **extra))
                found.append(jax.block_until_ready(jax.jit(window_metrics)(state)))
    for i in range(3):
        assert_close(found[3 + i], found[i], 1e-4)
    assert found[1]["load"] == 5
    assert found[2]["logit"] == -5


def run(step, params, opt_state, batches=BATCHES):
    """Returns losses, parameters and state; waits for each step.

    Several at once can wait for each other on a CPU: they share the threads of eight devices.
    """
    losses = []
    for batch in batches:
        loss, params, opt_state = jax.block_until_ready(step(params, opt_state, batch))
        losses.append(loss)
    return losses, params, opt_state


@pytest.mark.parametrize("name", OPTIONS)
def test_one_call_per_microbatch_equals_one_device(name):
    fun = loss_fn
    if name == "sums of losses":
        fun = lambda params, batch: loss_fn(params, batch) * batch["mask"].sum()  # noqa: E731
    inner = optax.adamw(1e-2, eps=1e-2)  # a step divides by |g| + eps
    alone = accumulate(K, inner, **OPTIONS[name])
    step = jax.jit(value_and_apply(alone, fun, weight_fn=tokens))
    expected = run(step, PARAMS, alone.init(PARAMS))
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto, (4, 2), ("data", "model"))):
        tx = accumulate(K, inner, reduce_axes="data", **OPTIONS[name])
        params = place(mesh)
        shardings = state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        placed = named(mesh, P()), jax.tree.map(lambda x: x.sharding, params), shardings
        step = value_and_apply(tx, fun, weight_fn=tokens)
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=placed)
        losses, params, state = run(step, params, state, [rows(mesh, b) for b in BATCHES])
        assert_close((losses, params), expected[:2], 1e-4)
        found = jax.block_until_ready(jax.jit(window_metrics)(state))
        assert_close(found, window_metrics(expected[2]), 1e-4)
    assert get_state(state).grad_sum["scale"].shape == (4, WIDTH)


@pytest.mark.parametrize("release", [None, True, False])
def test_only_a_release_sends_gradients(release):
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        tx = accumulate(K, optax.adam(1e-2), reduce_axes="data")
        params = place(mesh)
        state = jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)
        step = functools.partial(value_and_apply(tx, loss_fn), release=release)
        args = params, state, rows(mesh, BATCHES[0])
        always, sometimes = collectives(jax.jit(step).lower(*args).compile())
    loss, weight = 8, 4  # that of the microbatch comes with its weight
    assert sum(always) == loss + (BYTES + weight if release else 0)
    assert sum(sometimes) == (BYTES + weight if release is None else 0)


def test_a_bad_microbatch_of_one_device_is_rejected_on_all_or_has_no_weight():
    bad = [jax.tree.map(jnp.copy, batch) for batch in BATCHES[: K + 1]]
    bad[1]["mask"] = bad[1]["mask"].at[-1, 0].set(jnp.nan)
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        batches = [rows(mesh, batch) for batch in bad]
        for options in ({}, {"should_skip_update_fn": optax.skip_not_finite}):
            tx = accumulate(K, optax.sgd(0.1), reduce_axes="data", **options)
            params = place(mesh)
            step = jax.jit(value_and_apply(tx, loss_fn, weight_fn=tokens))
            _, params, state = run(step, params, tx.init(params), batches)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))
            assert state.skipped == (1 if options else 0)
            assert state.gradient_step == 1


def test_parameters_may_be_divided_over_the_axis():
    over_data = {
        "table": P("data"),
        "layers": {"a": P(None, "data"), "b": P(None, "data")},
        "scale": P("data"),
    }
    tx = accumulate(K, optax.adam(1e-2, eps=1e-2))
    step = jax.jit(value_and_apply(tx, loss_fn, weight_fn=tokens))
    expected = run(step, PARAMS, tx.init(PARAMS))
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        tx = accumulate(K, optax.adam(1e-2, eps=1e-2), reduce_axes="data")
        params = place(mesh, over_data)
        shardings = state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        assert bytes_on_first(state.grad_sum) == BYTES
        assert bytes_on_first(state.inner_state) == 2 * BYTES / DEVICES + 4
        placed = named(mesh, P()), jax.tree.map(lambda x: x.sharding, params), shardings
        step = jax.jit(value_and_apply(tx, loss_fn, weight_fn=tokens), out_shardings=placed)
        found = run(step, params, state, [rows(mesh, b) for b in BATCHES])
    assert_close(found[:2], expected[:2], 1e-4)


def test_a_fast_and_a_slow_network():
    """Parameters are divided within a replica, and reduced once between replicas."""
    inside = {
        "table": P("fsdp"),
        "layers": {"a": P(None, "fsdp"), "b": P(None, "fsdp")},
        "scale": P("fsdp"),
    }
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto, (2, 4), ("replica", "fsdp"))):
        shardings = named(mesh, inside)
        args = (
            jax.device_put(PARAMS, shardings),
            jax.device_put(WHOLE, named(mesh, P(("replica", "fsdp")))),
        )
        step = value_and_grad(loss_fn, num_microbatches=3, weight_fn=tokens, reduce_axes="replica")
        step = jax.jit(step, out_shardings=(named(mesh, P()), shardings))
        assert_close(step(*args), jax.jit(jax.value_and_grad(loss_fn))(PARAMS, WHOLE))


def test_a_train_state_has_it_too():
    tx = accumulate(K, optax.sgd(0.1))
    step = jax.jit(value_and_apply(tx, loss_fn, weight_fn=tokens))
    _, expected, _ = run(step, PARAMS, tx.init(PARAMS))
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        tx = accumulate(K, optax.sgd(0.1), reduce_axes="data")
        state = TrainState.create(apply_fn=loss_fn, params=place(mesh), tx=tx)
        step = jax.jit(lambda state, batch: state.value_and_apply(loss_fn, batch, weight_fn=tokens))
        for batch in BATCHES:
            _, state = jax.block_until_ready(step(state, rows(mesh, batch)))
        assert_close(state.params, expected)


def _squares(model, x, mask):
    return jnp.sum(mask * (jnp.tanh(model(x)) ** 2).mean(1)) / jnp.maximum(mask.sum(), 1)


def test_an_optimizer_of_nnx_takes_reduce_axes_and_refuses_changes_of_its_model():
    x = jax.random.normal(jax.random.key(0), (2 * K, ROWS, 8))
    mask = jnp.arange(2 * K * ROWS).reshape(2 * K, ROWS) % 5 > 1
    options = {"weight_fn": lambda model, x, mask: mask.sum(), "batch_argnums": (1, 2)}
    step = nnx.jit(lambda model, opt, *args: opt.value_and_apply(model, _squares, *args, **options))
    found = []
    for axes in ((), "data"):
        with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
            model = nnx.LoRALinear(8, 8, lora_rank=2, rngs=nnx.Rngs(0))
            model.lora.lora_b[...] += 0.1
            nnx.update(model, jax.device_put(nnx.state(model), named(mesh, P())))
            tx = accumulate(K, optax.sgd(0.1), reduce_axes=axes)
            optimizer = Optimizer(model, tx, wrt=nnx.LoRAParam)
            for args in zip(x, mask, strict=True):
                args = jax.device_put(args, named(mesh, P("data")))
                loss = jax.block_until_ready(step(model, optimizer, *args))
            found.append((loss, nnx.to_pure_dict(nnx.state(model))))
            assert optimizer.gradient_step == 2
    assert_close(*found)

    class Counting(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.calls = nnx.Variable(jnp.zeros([]))

        def __call__(self, x):
            self.calls[...] += 1
            return self.linear(x)

    with jax.set_mesh(make_mesh(AxisType.Auto)):
        model = Counting()
        optimizer = Optimizer(model, tx, wrt=nnx.Param)
        with pytest.raises(TypeError, match=r"changed argument 0.*calls.* in place"):
            step(model, optimizer, x[0], mask[0])


def test_a_mean_that_is_not_cast_has_the_dtype_of_sums_that_are_sent_in_another():
    seen = []

    def update_fn(updates, state, params=None):
        seen.append(jax.tree.map(jnp.dtype, updates))
        return updates, state

    inner = optax.GradientTransformation(optax.init_empty_state, update_fn)
    options = {"reduce_axes": "data", "reduce_dtype": jnp.bfloat16, "cast_mean": False}
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        tx, params = accumulate(K, inner, **options), place(mesh)
        jax.jit(value_and_apply(tx, loss_fn)).lower(params, tx.init(params), rows(mesh, BATCHES[0]))
    assert all(dtype == jnp.float32 for dtype in jax.tree.leaves(seen))


def test_mistakes_are_refused():
    step = value_and_grad(loss_fn, num_microbatches=2, reduce_axes="data")
    batch = BATCHES[0]
    tx = accumulate(K, optax.sgd(0.1), reduce_axes="data")
    with pytest.raises(ValueError, match=r"has the axes \[\]; call .* under one jax.set_mesh"):
        step(PARAMS, batch)
    with jax.set_mesh(make_mesh(AxisType.Auto)):
        state, by_loss = tx.init(PARAMS), value_and_apply(tx, loss_fn)
        few = jax.tree.map(lambda x: x[:12], batch)
        for call in (step, lambda params, batch: by_loss(params, state, batch)):
            with pytest.raises(ValueError, match=r"12 rows of batch leaf .*among the 8 devices"):
                call(PARAMS, few)
        with pytest.raises(ValueError, match="does not divide the 2 rows that a device holds"):
            value_and_grad(loss_fn, num_microbatches=4, reduce_axes="data")(PARAMS, batch)
        with pytest.raises(TypeError, match="`fun` has reduced it"):
            value_and_grad(
                lambda params, batch: lax.pmean(loss_fn(params, batch), "data"),
                num_microbatches=2,
                reduce_axes="data",
            )(PARAMS, batch)
        with pytest.raises(ValueError, match="`carry_argnum` cannot be used with `reduce_axes`"):
            value_and_grad(
                lambda params, batch, carry: (loss_fn(params, batch), (carry, ())),
                has_aux=True,
                num_microbatches=2,
                carry_argnum=2,
                reduce_axes="data",
            )(PARAMS, batch, 0.0)
        with pytest.raises(TypeError, match="pass `weight_fn` to `value_and_apply`"):
            by_loss(PARAMS, state, batch, weight=3.0)
        with pytest.raises(ValueError, match="'data', an Auto axis"):
            apply_gradients(tx, PARAMS, state, PARAMS)
        with pytest.raises(ValueError, match="'data', an Auto axis"):
            microbatched(loss_fn, num_microbatches=2, reduce_axes="data")(PARAMS, batch)
        alone = accumulate(K, optax.sgd(0.1)).init(PARAMS)
        with pytest.raises(ValueError, match=r"for each of the 8 devices along \('data',\)"):
            by_loss(PARAMS, alone, batch)
        logs = accumulate(K, optax.sgd(0.1), reduce_axes="data", metrics=("value",))
        with pytest.raises(ValueError, match=r"averages of \(\), but .* name \('value',\)"):
            value_and_apply(logs, loss_fn)(PARAMS, state, batch)
        with pytest.raises(TypeError, match="name that in `rng_argnums`"):
            value_and_apply(tx, lambda params, batch, key: loss_fn(params, batch))(
                PARAMS, state, batch, jax.random.key(0)
            )


@pytest.mark.skipif(not hasattr(jax, "reshard"), reason="an older JAX does not say what is wrong")
def test_a_constraint_that_names_the_axis_is_explained():
    def fun(params, batch):
        ids = lax.with_sharding_constraint(batch["ids"], P("data"))
        return loss_fn(params, {**batch, "ids": ids})

    with (
        jax.set_mesh(make_mesh(AxisType.Auto)),
        pytest.raises(ValueError, match=r"names an axis of `reduce_axes` \('data',\)"),
    ):
        value_and_grad(fun, num_microbatches=2, reduce_axes="data")(PARAMS, BATCHES[0])
