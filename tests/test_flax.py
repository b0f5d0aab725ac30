"""Flax train states that accumulate: Flax's programs with one import changed."""

import functools
import subprocess
import sys

from flax import linen as nn, nnx
from flax.training import train_state
from helpers.hlo import temporaries
from helpers.optimizers import reading
from helpers.steps import recording
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum
from optaccum import accumulate, get_state
import optaccum.flax

K, BATCH = 4, 16
X = jax.random.normal(jax.random.key(1), (2, BATCH, 3))
Y = jnp.sin(X.sum(axis=-1, keepdims=True))
# One rounding of each of 4 microbatches, of their sum and of the product; parameters near 1.
CLOSE = {"rtol": 8 * np.finfo(np.float32).eps, "atol": 8 * np.finfo(np.float32).eps}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.gelu(nn.Dense(5)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.linear1 = nnx.Linear(3, 5, rngs=rngs)
        self.linear2 = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        return self.linear2(nnx.gelu(self.linear1(x)))


def train_linen(TrainState, tx, k, **extra_args):
    """The training loop of Flax's documentation; returns the last state."""
    model = Linen()
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state, x, y):
        def loss_fn(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, **extra_args), loss

    for x, y in zip(X, Y, strict=True):
        for xs, ys in zip(jnp.split(x, k), jnp.split(y, k), strict=True):
            state, _ = train_step(state, xs, ys)
    return state


def train_nnx(Optimizer, tx, k, **extra_args):
    """The training loop of Flax's documentation; returns the parameters and the optimizer."""
    model = Nnx(nnx.Rngs(0))
    optimizer = Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x, y):
        def loss_fn(model):
            return jnp.mean((model(x) - y) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, **extra_args)
        return loss

    for x, y in zip(X, Y, strict=True):
        for xs, ys in zip(jnp.split(x, k), jnp.split(y, k), strict=True):
            train_step(model, optimizer, xs, ys)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer


def assert_all(check, a, b, **tolerances):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: check(np.asarray(x), np.asarray(y), **tolerances), a, b)


@pytest.mark.parametrize("TrainState", [train_state.TrainState, optaccum.flax.TrainState])
@pytest.mark.parametrize("k", [1, K])
def test_a_linen_loop_gets_the_result_of_the_full_batch(TrainState, k):
    inner = optax.adamw(0.01, eps=1e-3)
    expected = train_linen(train_state.TrainState, inner, 1)
    state = train_linen(TrainState, accumulate(k, inner), k)
    assert_all(np.testing.assert_allclose, state.params, expected.params, **CLOSE)
    assert int(state.step) == 2 * k


@pytest.mark.parametrize("Optimizer", [nnx.Optimizer, optaccum.flax.Optimizer])
@pytest.mark.parametrize("k", [1, K])
def test_an_nnx_loop_gets_the_result_of_the_full_batch(Optimizer, k):
    inner = optax.adamw(0.01, eps=1e-3)
    expected, _ = train_nnx(nnx.Optimizer, inner, 1)
    params, optimizer = train_nnx(Optimizer, accumulate(k, inner), k)
    assert_all(np.testing.assert_allclose, params, expected, **CLOSE)
    assert int(optimizer.step[...]) == 2 * k


OTHERS = {
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.clip(0.1), optax.sgd(0.1, momentum=0.9)),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}


@pytest.mark.parametrize("tx", OTHERS.values(), ids=OTHERS)
def test_other_transformations_behave_as_in_flax(tx):
    ours, theirs = (
        train_linen(TrainState, tx, K)
        for TrainState in (optaccum.flax.TrainState, train_state.TrainState)
    )
    for name in ("step", "params", "opt_state"):
        assert_all(np.testing.assert_array_equal, getattr(ours, name), getattr(theirs, name))
    (ours, one), (theirs, other) = (
        train_nnx(Optimizer, tx, K) for Optimizer in (optaccum.flax.Optimizer, nnx.Optimizer)
    )
    assert_all(np.testing.assert_array_equal, ours, theirs)
    assert_all(
        np.testing.assert_array_equal,
        jax.tree.leaves(one.opt_state),
        jax.tree.leaves(other.opt_state),
    )
    with pytest.raises(ValueError, match="holds no AccumulateState"):
        _ = one.mini_step


def simple_states(tx):
    """Returns what takes a step with scalar gradients, and reads a property, in linen and nnx."""
    state = optaccum.flax.TrainState.create(apply_fn=None, params={"w": jnp.ones(())}, tx=tx)

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(()))

    model = Model()
    optimizer = optaccum.flax.Optimizer(model, tx, wrt=nnx.Param)

    def linen_step(g, **extra_args):
        nonlocal state
        state = state.apply_gradients(grads={"w": jnp.asarray(g)}, **extra_args)

    def nnx_step(g, **extra_args):
        grads = nnx.grad(lambda model: g * model.w[...])(model)
        optimizer.update(model, grads, **extra_args)

    return {
        "linen": (linen_step, lambda: state, lambda: state.params["w"]),
        "nnx": (nnx_step, lambda: optimizer, lambda: model.w[...]),
    }


@pytest.fixture(params=["linen", "nnx"])
def flavour(request):
    return request.param


def test_the_properties_say_where_the_window_stands(flavour):
    step, state, param = simple_states(accumulate(2, optax.sgd(1.0)))[flavour]
    seen = []
    for g in (1.0, 3.0, 1.0, jnp.nan):
        step(g)
        s = state()
        seen.append((int(s.mini_step), int(s.gradient_step), bool(s.has_released), float(param())))
        assert all(isinstance(x, jax.Array) for x in (s.mini_step, s.gradient_step, s.has_released))
    assert seen[:3] == [(1, 0, False, 1.0), (0, 1, True, -1.0), (1, 1, False, -1.0)]
    assert seen[3][:3] == (0, 2, True)


def test_update_returns_what_changed():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = optaccum.flax.Optimizer(model, accumulate(2, optax.sgd(0.5)), wrt=nnx.Param)
    for expected in (0.0, -0.5):
        updates = optimizer.update(model, nnx.grad(lambda model: model(X[0, 0])[0])(model))
        np.testing.assert_allclose(updates["bias"], [expected], rtol=1e-6)
    assert jax.tree.leaves(updates)[1].shape == (3, 1)
    model.bias[...] = jnp.full(1, -jnp.inf)  # as a mask has it
    updates = optimizer.update(model, nnx.grad(lambda model: model(X[0, 0])[0] * 0)(model))
    np.testing.assert_array_equal(updates["bias"], [0.0])


def test_plain_arrays_are_gradients_where_flax_takes_them():
    """What Flax's own optimizer takes; newer Flax wants the variables."""
    results = []
    for Optimizer in (nnx.Optimizer, optaccum.flax.Optimizer):
        model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        optimizer = Optimizer(model, accumulate(2, optax.sgd(0.5)), wrt=nnx.Param)
        grads = nnx.to_pure_dict(nnx.grad(lambda model: model(X[0, 0])[0])(model))
        try:
            for _ in range(2):
                optimizer.update(model, grads)
            results.append(float(model.bias[0]))
        except Exception:
            results.append("refused")
    assert results[0] == results[1]


def test_weight_and_release_are_passed_on(flavour):
    step, state, param = simple_states(accumulate(8, optax.sgd(1.0)))[flavour]
    step(2.0, weight=3)
    step(6.0, weight=1.0)
    assert float(param()) == 1.0
    step(1.0, weight=4, release=True)
    np.testing.assert_allclose(param(), 1 - (6 + 6 + 4) / 8, rtol=1e-6)
    assert state().has_released
    step(1.0, release=False)
    assert not state().has_released


@pytest.mark.parametrize("tx", [accumulate(K, optax.adam(0.1)), optax.adam(0.1)])
def test_a_loss_is_taken_in_as_its_gradient_is(tx):
    class State(optaccum.flax.TrainState):
        seen: jax.Array

    model = Linen()
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    start = State.create(apply_fn=model.apply, params=params, tx=tx, seen=jnp.int32(0))

    def loss_fn(params, x, y):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2), x.sum()

    @jax.jit
    def by_loss(state, x, y):
        return state.value_and_apply(loss_fn, x, y, has_aux=True, weight=None, seen=state.seen + 1)

    @jax.jit
    def by_gradient(state, x, y):
        value, grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, x, y)
        return value, state.apply_gradients(grads=grads, seen=state.seen + 1)

    found = expected = start
    for x, y in zip(jnp.split(X[0], K), jnp.split(Y[0], K), strict=True):
        (loss, aux), found = by_loss(found, x, y)
        (wanted, sums), expected = by_gradient(expected, x, y)
        assert (loss, aux) == (wanted, sums)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (found.step, found.seen) == (K, K)
    with pytest.raises(TypeError, match="`sen` is not a field of State"):
        start.value_and_apply(loss_fn, x, y, has_aux=True, sen=1)


def test_extra_arguments_reach_the_transformation(flavour):
    tx = accumulate(2, recording(), average_args=("value",))
    step, state, _ = simple_states(tx)[flavour]
    step(1.0, value=2.0)
    step(1.0, value=6.0)
    inner_state = get_state(state().opt_state).inner_state
    assert float(jax.tree.leaves(inner_state.value)[0]) == 4.0


def test_extra_arguments_reach_another_transformation(flavour):
    """Flax's linen train state takes them for fields."""
    step, _, param = simple_states(optax.polyak_sgd())[flavour]
    step(2.0, value=2.0)  # a step of value / |g|^2 along g
    np.testing.assert_allclose(param(), 1 - 2 * 2 / 4, rtol=1e-6)
    step, *_ = simple_states(optax.identity())[flavour]
    with pytest.raises(TypeError, match="typo"):
        step(1.0, typo=1.0)


@pytest.mark.parametrize("tx", [optax.adam(0.1), accumulate(2, optax.adam(0.1))])
def test_a_collection_that_is_no_field_is_refused(tx):
    """Optax takes any argument and says nothing: BatchNorm would never move."""
    state = optaccum.flax.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
    with pytest.raises(TypeError, match=r"`batch_stats` is not a field of TrainState.*subclass it"):
        state.apply_gradients(grads={"w": jnp.ones(2)}, batch_stats={"mean": jnp.ones(2)})


def test_none_is_no_extra_argument():
    step, *_ = simple_states(optax.scale(-1.0))["linen"]
    step(1.0, weight=None, release=None)
    with pytest.raises(TypeError, match="weight"):
        step(1.0, weight=2)


class WithStatistics(optaccum.flax.TrainState):
    batch_stats: dict


def test_fields_are_replaced_as_in_flax():
    tx = accumulate(2, recording(), average_args=("value",))
    state = WithStatistics.create(
        apply_fn=None, params={"w": jnp.ones(2)}, tx=tx, batch_stats={"mean": jnp.zeros(2)}
    )
    state = state.apply_gradients(
        grads={"w": jnp.ones(2)}, batch_stats={"mean": jnp.ones(2)}, value=3.0, weight=2
    )
    np.testing.assert_array_equal(state.batch_stats["mean"], np.ones(2))
    assert state.opt_state.arg_sums["sum_of_value"] == 6.0
    assert isinstance(state, WithStatistics)


def test_the_compiled_step_is_that_of_apply_gradients():
    params = {f"w{i}": jnp.zeros((64, 64)) for i in range(4)}
    tx = accumulate(K, optax.adamw(1e-3))
    size = sum(x.nbytes for x in params.values())

    def bare(params, opt_state, grads):
        return optaccum.apply_gradients(tx, grads, opt_state, params)

    bare = jax.jit(bare, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()

    state = optaccum.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
    linen = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0)
    linen = linen.lower(state, params).compile()

    class Model(nnx.Module):
        def __init__(self):
            for name, value in params.items():
                setattr(self, name, nnx.Param(value))

    model = Model()
    optimizer = optaccum.flax.Optimizer(model, tx, wrt=nnx.Param)
    model_graph, model_state = nnx.split(model)
    optimizer_graph, optimizer_state = nnx.split(optimizer)

    def step(model_state, optimizer_state, grads):
        model = nnx.merge(model_graph, model_state)
        optimizer = nnx.merge(optimizer_graph, optimizer_state)
        optimizer.update(model, grads)
        return nnx.state(model), nnx.state(optimizer)

    functional = jax.jit(step, donate_argnums=(0, 1))
    functional = functional.lower(model_state, optimizer_state, model_state).compile()

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def in_place(model, optimizer, grads):
        optimizer.update(model, grads)

    compiled = in_place.lower(model, optimizer, model_state).compile()
    programs = [bare, linen, functional, getattr(compiled, "compiled", compiled)]
    assert [temporaries(program) / size < 0.02 for program in programs] == [True] * 4
    conditionals = [program.as_text().count(" conditional(") for program in programs]
    assert conditionals == [1] * 4


def test_lora_trains_in_part():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.lora = nnx.LoRA(3, 4, 2, base_module=self.linear, rngs=rngs)

        def __call__(self, x):
            return self.lora(x)

    def train(tx, k):
        model = Model(nnx.Rngs(0))
        model.lora.lora_b[...] = jnp.ones_like(model.lora.lora_b[...])
        before = np.asarray(model.linear.kernel[...])
        optimizer = optaccum.flax.Optimizer(model, tx, wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model, optimizer, x):
            def loss(model, x):
                return jnp.mean(model(x) ** 2)

            grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
            optimizer.update(model, grads)

        for x in jnp.split(X[0], k):
            step(model, optimizer, x)
        np.testing.assert_array_equal(model.linear.kernel[...], before)
        return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)), optimizer

    expected, _ = train(optax.sgd(0.1), 1)
    params, optimizer = train(accumulate(K, optax.sgd(0.1)), K)
    assert_all(np.testing.assert_allclose, params, expected, **CLOSE)
    sums = jax.tree.leaves(get_state(optimizer.opt_state).grad_sum)
    assert sorted(x.shape for x in sums) == [(3, 4), (4, 2)]


def test_sharded_parameters_with_metadata_keep_their_sharding():
    mesh = jax.make_mesh((8,), ("data",))
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "data"))

    @nnx.jit
    def make():
        model = nnx.Linear(4, 16, kernel_init=kernel_init, rngs=nnx.Rngs(0))
        optimizer = optaccum.flax.Optimizer(model, accumulate(2, optax.adam(0.1)), wrt=nnx.Param)
        for node in (model, optimizer):
            state = nnx.state(node)
            specs = nnx.get_partition_spec(state)
            nnx.update(node, jax.lax.with_sharding_constraint(state, specs))
        return model, optimizer

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))

    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        model, optimizer = make()
        for _ in range(2):
            step(model, optimizer, jnp.ones((8, 4)))
    spec = jax.P(None, "data")
    state = get_state(optimizer.opt_state)
    sharded = [model.kernel, state.grad_sum["kernel"], state.inner_state[0].mu["kernel"]]
    assert [x[...].sharding.spec for x in sharded] == [spec] * 3
    assert optimizer.has_released


def test_an_optimizer_may_be_split_and_merged_in_mid_window():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = optaccum.flax.Optimizer(model, accumulate(2, optax.sgd(1.0)), wrt=nnx.Param)
    before = np.asarray(model.bias[...])
    for _ in range(2):
        graph, state = nnx.split((model, optimizer))
        model, optimizer = nnx.merge(graph, state)
        assert isinstance(optimizer, optaccum.flax.Optimizer)
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(X[0, :1])))(model))
    assert optimizer.has_released
    np.testing.assert_allclose(model.bias[...], before - 1.0, rtol=1e-6)


def test_schedules_averages_and_hyperparameters_move_once_a_window(flavour):
    inner = optax.chain(
        optax.ema(0.5, debias=False),
        optax.inject_hyperparams(optax.sgd)(learning_rate=lambda step: 1.0 / (1 + step)),
    )
    step, state, param = simple_states(accumulate(2, inner))[flavour]
    averages, rates = [], []
    for g in (4.0, 8.0, 0.0, 4.0):
        step(g)
        ema, sgd = get_state(state().opt_state).inner_state
        averages.append(float(jax.tree.leaves(ema.ema)[0]))
        rates.append(float(jax.tree.leaves(sgd.hyperparams["learning_rate"])[0]))
    assert averages == [0.0, 3.0, 3.0, 2.5]
    assert rates == [1.0, 1.0, 1.0, 0.5]
    assert float(param()) == 1.0 - 3.0 - 0.5 * 2.5


def test_batch_norm_moves_with_every_call():
    linen = nn.BatchNorm(use_running_average=False, momentum=0.5)
    variables = linen.init(jax.random.key(0), X[0])
    state = WithStatistics.create(
        apply_fn=linen.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=accumulate(2, optax.sgd(0.1)),
    )

    @jax.jit
    def step(state, x):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            y, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
            return jnp.mean(y**3), updates

        grads, updates = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])

    model = nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    optimizer = optaccum.flax.Optimizer(model, accumulate(2, optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def nnx_step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 3))(model))

    expected = np.zeros(3)
    for x in jnp.split(X[0], 2):
        expected = 0.5 * expected + 0.5 * np.mean(np.asarray(x, np.float64), axis=0)
        state = step(state, x)
        nnx_step(model, optimizer, x)
        for mean in (state.batch_stats["mean"], model.mean[...]):
            np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
    assert state.has_released
    assert optimizer.has_released


class Noisy(nnx.Module):
    """A model with batch statistics and dropout, which every call changes."""

    def __init__(self, rngs):
        self.linear1 = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.linear2 = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        return self.linear2(self.dropout(nnx.gelu(self.norm(self.linear1(x)))))


@pytest.mark.parametrize("every_k", [1, K])
def test_an_nnx_optimizer_steps_from_a_loss(every_k):
    """It does what `nnx.value_and_grad` and `update` do, and changes the same in the model."""

    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2), x.sum()

    def in_two_calls(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y)
        optimizer.update(model, grads, weight=len(x))
        return value

    def in_one(model, optimizer, x, y):
        weigh = lambda model, x, y: len(x)  # noqa: E731
        return optimizer.value_and_apply(model, loss_fn, x, y, has_aux=True, weight_fn=weigh)

    found = []
    for way in (in_two_calls, in_one):
        model = Noisy(nnx.Rngs(0))
        tx = accumulate(every_k, optax.adam(0.1, eps=0.1))
        optimizer = optaccum.flax.Optimizer(model, tx, wrt=nnx.Param)
        step = nnx.jit(way)
        values = [
            step(model, optimizer, xs, ys)
            for x, y in zip(X, Y, strict=True)
            for xs, ys in zip(jnp.split(x, K), jnp.split(y, K), strict=True)
        ]
        arrays = jax.tree.leaves((values, nnx.state(model), nnx.state(optimizer)))
        found.append(
            [jax.random.key_data(x) if x.dtype.name.startswith("key") else x for x in arrays]
        )
        assert optimizer.gradient_step == 2 * K // every_k
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, **CLOSE)


def test_without_flax_the_import_says_how_to_install_it():
    program = "import sys; sys.modules['flax'] = None; import optaccum; import optaccum.flax"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode != 0
    assert "pip install 'optaccum[flax]'" in process.stderr


# Keywords that are almost fields, and extra arguments of links.


PARAMS = {"w": jnp.ones(2)}
GRADS = {"w": jnp.full(2, 2.0)}


def _train_state(tx, **fields):
    flax = pytest.importorskip("optaccum.flax")
    annotations = dict.fromkeys(fields, object)
    State = type("State", (flax.TrainState,), {"__annotations__": annotations})
    return State.create(apply_fn=None, params=PARAMS, tx=tx, **fields)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("every_k", [None, 1, 2])
def test_a_keyword_that_is_almost_a_field_is_refused(every_k, jit):
    tx = optax.adam(0.1) if every_k is None else optaccum.accumulate(every_k, optax.adam(0.1))
    state = _train_state(tx, key=jax.random.key(0))

    def step(state, **kwargs):
        return state.apply_gradients(grads=GRADS, **kwargs)

    step = jax.jit(step) if jit else step
    message = r"`keey` is not a field of State and no argument of its `tx`, did you mean `key`\?"
    with pytest.raises(TypeError, match=message):
        step(state, keey=jax.random.key(1))
    with pytest.raises(TypeError, match="did you mean `apply_fn`"):
        state.apply_gradients(grads=GRADS, aply_fn=lambda: None)
    with pytest.raises(TypeError, match="did you mean `value`"):
        step(state, vlaue=1.0)
    state = step(state, key=jax.random.key(1), value=1.0)
    assert jax.random.key_data(state.key)[1] == 1


@pytest.mark.parametrize("every_k", [None, 1, 2])
@pytest.mark.parametrize("value", [3.0, {"a": jnp.float32(3), "b": jnp.ones(2)}], ids=type)
def test_extra_arguments_of_links_are_passed_on(every_k, value):
    """A link of a chain does not show in the signature."""
    inner = optax.chain(optax.clip(9.0), reading("hyper"))
    tx = inner if every_k is None else optaccum.accumulate(every_k, inner)
    state = _train_state(tx)
    for _ in range(every_k or 1):
        state = state.apply_gradients(grads=GRADS, hyper=value)
    np.testing.assert_array_equal(state.params["w"], np.full(2, 1 + 6.0))
