"""Flax's train states on eight devices: sums and moments lie like the parameters, and stay so."""

import functools

from flax import linen as nn, nnx
from helpers.fp8 import OWG, Fp8, input_history
from helpers.hlo import collectives
from helpers.meshes import DEVICES, bytes_on_first, make_mesh
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from optaccum import accumulate, get_state, state_shardings
import optaccum.flax

K, ROWS, WIDTH = 2, 16, 16
X = jax.random.normal(jax.random.key(1), (2 * K, ROWS, WIDTH))
INNER = optax.adam(0.1, eps=1e-2)
TX = accumulate(K, INNER)


@pytest.fixture
def mesh():
    return make_mesh(AxisType.Auto)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(jnp.tanh(nn.Dense(WIDTH)(x)))


class Boxed(nn.Module):
    """Of its four parameters, two say where they lie."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", None))
        bias = nn.with_partitioning(nn.initializers.zeros, ("data",))
        return nn.Dense(8)(jnp.tanh(nn.Dense(WIDTH, kernel_init=kernel, bias_init=bias)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.linear1 = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.linear2 = nnx.Linear(WIDTH, 8, rngs=rngs)

    def __call__(self, x):
        return self.linear2(jnp.tanh(self.linear1(x)))


def create(model, key, tx=TX):
    variables = model.init(key, jnp.ones((1, WIDTH)))
    params = variables if OWG in variables else variables["params"]
    return optaccum.flax.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def fsdp(mesh, params):
    """Every parameter divided along its first axis."""
    return jax.tree.map(lambda x: NamedSharding(mesh, P("data", *[None] * (x.ndim - 1))), params)


def train(mesh, model, shardings_of):
    """Returns a whole train state, placed and trained, and one of as many whole batches."""
    make = functools.partial(create, model)
    shapes = jax.eval_shape(make, jax.random.key(0))
    placed = shardings_of(shapes)

    def train_step(state, x, **extra_args):
        def loss(params):
            variables = params if OWG in params else {"params": params}
            return jnp.mean(state.apply_fn(variables, x) ** 2)

        grads = jax.grad(loss)(state.params)
        return state.apply_gradients(grads=grads, **extra_args)

    def compiled(**extra_args):
        step = functools.partial(train_step, **extra_args)
        program = jax.jit(step, donate_argnums=0, out_shardings=placed)
        return program.lower(state, batches[0]).compile()

    batches = jax.device_put(list(X), NamedSharding(mesh, P("data")))
    state = jax.jit(make, out_shardings=placed)(jax.random.key(0))
    step = compiled()
    # The loss gathers parameters, as on every hold; sums and moments nobody does.
    on_holds, _ = collectives(compiled(release=False), "all-gather")
    assert collectives(step, "all-gather") == (on_holds, [])
    for x in batches:
        state = step(state, x)
    assert int(state.gradient_step) == 2
    alone = make(jax.random.key(0), tx=INNER)
    for window in X.reshape(2, K * ROWS, WIDTH):
        alone = jax.jit(train_step)(alone, window)
    return state, alone


def check(state, alone):
    expected = jax.tree.map(np.asarray, nn.unbox(alone.params))
    jax.tree.map(
        # Sums in another order, in a step of 0.1 that is divided by |g| + 1e-2.
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4),
        jax.tree.map(np.asarray, nn.unbox(state.params)),
        expected,
    )


def specs_of(tree):
    return jax.tree.map(lambda x: x.sharding.spec, nn.unbox(tree))


def test_a_linen_train_state(mesh):
    everywhere = NamedSharding(mesh, P())

    def shardings_of(shapes):
        params = fsdp(mesh, shapes.params)
        opt_state = state_shardings(TX, shapes.params, params)
        return shapes.replace(step=everywhere, params=params, opt_state=opt_state)

    state, alone = train(mesh, Plain(), shardings_of)
    check(state, alone)
    adam = state.opt_state.inner_state[0]
    assert specs_of(state.opt_state.grad_sum) == specs_of(adam.mu) == specs_of(state.params)
    total = sum(x.nbytes for x in jax.tree.leaves(alone.params))
    for tree in (state.params, state.opt_state.grad_sum, adam.nu):
        assert bytes_on_first(tree) == total // DEVICES


@pytest.mark.parametrize("ours", [True, False], ids=["state_shardings", "flax.linen.get_sharding"])
def test_a_linen_train_state_with_boxed_parameters(mesh, ours):
    def shardings_of(shapes):
        everything = nn.get_sharding(shapes, mesh)
        if not ours:
            return everything
        opt_state = state_shardings(TX, shapes.params, everything.params)
        return everything.replace(opt_state=opt_state)

    state, alone = train(mesh, Boxed(), shardings_of)
    check(state, alone)
    sums = state.opt_state.grad_sum
    assert isinstance(sums["Dense_1"]["kernel"], nn.Partitioned)
    assert specs_of(sums) == specs_of(state.params) == specs_of(state.opt_state.inner_state[0].nu)
    assert specs_of(sums)["Dense_1"] == {"kernel": P("data", None), "bias": P("data")}
    assert specs_of(sums)["Dense_0"] == {"kernel": P(), "bias": P()}


def test_a_linen_train_state_with_a_collection_to_overwrite(mesh):
    everywhere = NamedSharding(mesh, P())

    def shardings_of(shapes):
        params = {"params": fsdp(mesh, shapes.params["params"]), OWG: everywhere}
        opt_state = shapes.opt_state._replace(
            largest=everywhere,
            opt_state=state_shardings(TX, shapes.params["params"], params["params"]),
        )
        return shapes.replace(step=everywhere, params=params, opt_state=opt_state)

    state, alone = train(mesh, Fp8(), shardings_of)
    assert specs_of(get_state(state.opt_state).grad_sum) == specs_of(state.params["params"])
    assert set(jax.tree.leaves(specs_of(state.opt_state.largest))) == {P()}
    np.testing.assert_allclose(input_history(state), input_history(alone), rtol=1e-6)
    assert np.count_nonzero(input_history(state)) == 2


def pure(tree):
    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.to_arrays(nnx.pure(tree))


def train_nnx(model, optimizer, batches):
    @nnx.jit
    def train_step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))

    for x in batches:
        train_step(model, optimizer, x)
    return pure(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("jitted", [False, True])
def test_an_nnx_optimizer(mesh, jitted):
    """Made eagerly, it follows the parameters; under jit nothing says where zeros lie."""

    def place(model):
        params = pure(nnx.state(model, nnx.Param))
        constrain = jax.lax.with_sharding_constraint if jitted else jax.device_put
        nnx.update(model, constrain(params, fsdp(mesh, params)))

    def make():
        model = Nnx(nnx.Rngs(0))
        place(model)
        optimizer = optaccum.flax.Optimizer(model, TX, wrt=nnx.Param)
        if jitted:
            params = pure(nnx.state(model, nnx.Param))
            shardings = state_shardings(TX, params, fsdp(mesh, params))
            state = jax.lax.with_sharding_constraint(pure(optimizer.opt_state), shardings)
            nnx.update(optimizer.opt_state, nnx.state(state))
        return model, optimizer

    model, optimizer = nnx.jit(make)() if jitted else make()
    batches = jax.device_put(list(X), NamedSharding(mesh, P("data")))
    alone = Nnx(nnx.Rngs(0))
    before = bytes_on_first(pure(nnx.state(alone)))
    for steps in (0, 2 * K):
        params = train_nnx(model, optimizer, batches[:steps])
        state = get_state(pure(optimizer.opt_state))
        for tree in (params, state.grad_sum, state.inner_state[0].mu):
            assert bytes_on_first(tree) == before // DEVICES
    expected = train_nnx(
        alone, nnx.Optimizer(alone, INNER, wrt=nnx.Param), X.reshape(2, K * ROWS, WIDTH)
    )
    for a, e in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


def test_the_variables_of_nnx_as_parameters(mesh):
    """`nnx.State`s with metadata, real and abstract, with Flax's shardings for them or ours."""

    def partitioned(initializer, *names):
        return nnx.with_partitioning(initializer, names)

    def make():
        kernel = partitioned(nnx.initializers.lecun_normal(), "data", None)
        bias = partitioned(nnx.initializers.zeros, "data")
        model = nnx.Linear(8, 8, kernel_init=kernel, bias_init=bias, rngs=nnx.Rngs(0))
        return nnx.state(model, nnx.Param)

    wanted = {"kernel": P("data", None), "bias": P("data")}
    with jax.set_mesh(mesh):
        params = jax.device_put(make(), nnx.get_named_sharding(nnx.eval_shape(make), mesh))
        found = [
            state_shardings(TX, params),
            state_shardings(TX, nnx.eval_shape(make), nnx.get_named_sharding(params, mesh)),
        ]
        assert pure(found[0]) == pure(found[1])
        state = jax.jit(TX.init, out_shardings=found[0])(params)
    specs = state_shardings(TX, params, nnx.get_partition_spec(params))
    for tree in (specs.grad_sum, specs.inner_state[0].mu):
        assert {name: pure(tree)[name] for name in wanted} == wanted
    for tree in (state.grad_sum, state.inner_state[0].nu):
        assert {name: tree[name][...].sharding.spec for name in wanted} == wanted
