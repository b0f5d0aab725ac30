"""On several devices: the state lies where its parameters lie, and no hold gathers anything."""

import functools

from helpers.hlo import collectives, temporaries
from helpers.meshes import DEVICES, bytes_on_first, named, only_auto
from helpers.steps import every_step, update_and_apply
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from optaccum import accumulate, apply_gradients, state_shardings

ROW_PARAMS = {"w": np.arange(32, dtype=np.float32).reshape(8, 4) / 32, "b": np.ones(4, np.float32)}
ROW_SPECS = {"w": P("data", None), "b": P(None)}
BATCH = jax.random.normal(jax.random.key(0), (4, 16, 8))


def _row_loss(params, x):
    return jnp.mean((x @ params["w"] + params["b"]) ** 2)


def _place_rows(mesh):
    return jax.device_put(
        ROW_PARAMS, {name: NamedSharding(mesh, s) for name, s in ROW_SPECS.items()}
    )


def _specs(tree):
    return {name: x.sharding.spec for name, x in tree.items()}


@functools.cache
def _expected_rows():
    params = jax.tree.map(jnp.asarray, ROW_PARAMS)
    state = optax.adam(0.1).init(params)
    for i in (0, 2):
        grads = jax.grad(_row_loss)(params, BATCH[i : i + 2].reshape(32, 8))
        params, state = update_and_apply(optax.adam(0.1), grads, state, params)
    return params


def _assert_close(actual, expected):
    # Adam divides by the root of a second moment that differs in its last bits.
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-5)


def test_init_follows_the_parameters_eagerly(mesh):
    with jax.set_mesh(mesh):
        params = _place_rows(mesh)
        state = accumulate(2, optax.adam(0.1)).init(params)
    assert _specs(state.grad_sum) == _specs(params)
    assert _specs(state.inner_state[0].mu) == _specs(params)


@pytest.mark.parametrize("mesh", [AxisType.Explicit], indirect=True)
def test_init_under_jit_follows_where_sharding_is_explicit(mesh):
    with jax.set_mesh(mesh):
        params = _place_rows(mesh)
        state = jax.jit(accumulate(2, optax.adam(0.1)).init)(params)
        assert [jax.typeof(x) for x in jax.tree.leaves(state.grad_sum)] == [
            jax.typeof(x) for x in jax.tree.leaves(params)
        ]


def test_sharded_training_equals_the_full_batch(mesh):
    tx = accumulate(2, optax.adam(0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x, weight):
        grads = jax.grad(_row_loss)(params, x)
        return apply_gradients(tx, grads, state, params, weight=weight)

    with jax.set_mesh(mesh):
        params = _place_rows(mesh)
        state = tx.init(params)
        for x in BATCH:
            x = jax.device_put(x, NamedSharding(mesh, P(None, None)))
            params, state = train_step(params, state, x, 2.0)
    for tree in (params, state.grad_sum, state.inner_state[0].mu):
        for name, spec in ROW_SPECS.items():
            wanted = NamedSharding(mesh, spec)
            assert tree[name].sharding.is_equivalent_to(wanted, tree[name].ndim)
    _assert_close(params, _expected_rows())


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_window_in_shard_map_equals_the_full_batch(mesh, check_vma):
    tx = accumulate(2, optax.adam(0.1))

    def train_step(params, state, x):
        grads = jax.grad(_row_loss)(params, x)
        if check_vma:  # the gradient of replicated parameters is already summed
            grads = jax.tree.map(lambda g: g / DEVICES, grads)
        else:
            grads = jax.lax.pmean(grads, "data")
        return apply_gradients(tx, grads, state, params)

    mapped = jax.shard_map(
        train_step,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        replicated = NamedSharding(mesh, P())
        params = jax.device_put(ROW_PARAMS, replicated)
        state = jax.device_put(tx.init(params), replicated)
        for x in BATCH:
            x = jax.device_put(x, NamedSharding(mesh, P("data")))
            params, state = jax.jit(mapped)(params, state, x)
    _assert_close(params, _expected_rows())


# Sums that are sharded: what that saves, and what the steps gather.


ROWS, K = 64, 2
# NumPy's, so that no donated buffer is theirs.
PARAMS = {
    "w": np.linspace(-1, 1, 512, dtype=np.float32).reshape(8, 64),
    "b": np.zeros(64, np.float32),
}
SPECS = {"w": P("data", None), "b": P("data")}
BATCHES = jax.random.normal(jax.random.key(0), (2 * K, ROWS, 8))


def _loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def _place(mesh, tree, wanted):
    """Returns `tree` placed so within a program, whichever kind of mesh it is."""
    explicit = mesh.axis_types[0] is AxisType.Explicit
    place = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    return place(tree, wanted)


def _gather(mesh):
    return optax.stateless(lambda u, _: _place(mesh, u, NamedSharding(mesh, P())))


def _gathers(compiled):
    """Returns how often parameters are gathered always, and how often in a branch only."""
    always, sometimes = collectives(compiled, "all-gather")
    return len(always), len(sometimes)


@functools.cache
def _expected():
    params, tx = jax.tree.map(jnp.asarray, PARAMS), optax.adam(0.1)
    state = tx.init(params)
    for i in range(0, 2 * K, K):
        grads = jax.grad(_loss)(params, BATCHES[i : i + K].reshape(K * ROWS, 8))
        params, state = update_and_apply(tx, grads, state, params)
    return params


def _assert_equal(params):
    # Adam divides by the root of a second moment that differs in its last bits.
    for name, value in _expected().items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-5)


def _program(mesh, tx, step, shardings, divided=None, **extra):
    """Returns the jitted step from and to parameters and state placed like `shardings`."""

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=shardings)
    def run(params, state, x):
        if mesh.axis_types[0] is AxisType.Explicit:  # rows and parameters over one axis
            everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
            grads = jax.grad(_loss)(_place(mesh, params, everywhere), x)
            grads = _place(mesh, grads, divided or shardings[0])
        else:
            grads = jax.grad(_loss)(params, x)
        return step(tx, grads, state, params, **extra)

    return run


def _train(mesh, program, params, state):
    for x in BATCHES:
        params, state = program(params, state, jax.device_put(x, NamedSharding(mesh, P("data"))))
    _assert_equal(params)
    return params, state


@every_step
def test_sums_of_fully_sharded_parameters_are_not_gathered(mesh, step):
    tx = accumulate(K, optax.adam(0.1))
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, named(mesh, SPECS))
        shardings = state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        x = jax.device_put(BATCHES[0], NamedSharding(mesh, P("data")))
        places = named(mesh, SPECS), shardings
        programs = {
            release: _program(mesh, tx, step, places, release=release).lower(params, state, x)
            for release in (None, False, True)
        }
        programs = {release: program.compile() for release, program in programs.items()}
        for program in programs.values():  # what the loss needs, each parameter once
            assert _gathers(program) == (len(PARAMS), 0)
        assert bytes_on_first(state.grad_sum) == bytes_on_first(params) == 4 * (512 + 64) // DEVICES
        params, state = _train(mesh, programs[None], params, state)
    assert jax.tree.map(lambda x: x.sharding.spec, state.grad_sum) == SPECS


@every_step
@pytest.mark.parametrize("moments", [True, False], ids=["sums and moments", "sums alone"])
def test_divided_sums_are_gathered_in_a_release_alone(mesh, step, moments):
    inner = optax.adam(0.1), _gather(mesh)
    tx = accumulate(K, optax.chain(*inner if moments else reversed(inner)))
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, P())
        params = jax.device_put(PARAMS, everywhere)
        shardings = divided = state_shardings(tx, params, named(mesh, SPECS))
        if not moments:
            shardings = state_shardings(tx, params)._replace(grad_sum=divided.grad_sum)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        full = bytes_on_first(params)
        assert bytes_on_first(tx.init(params).grad_sum) == full
        assert bytes_on_first(state.grad_sum) == full // DEVICES
        adam = state.inner_state[0 if moments else 1][0]
        moment = full // DEVICES if moments else full
        assert bytes_on_first(adam.mu) == bytes_on_first(adam.nu) == moment
        x = jax.device_put(BATCHES[0], NamedSharding(mesh, P("data")))
        places = jax.tree.map(lambda _: everywhere, params), shardings
        n, programs = len(PARAMS), {}
        for release, gathers in ((None, (0, n)), (False, (0, 0)), (True, (n, 0))):
            program = _program(mesh, tx, step, places, divided.grad_sum, release=release)
            programs[release] = program.lower(params, state, x).compile()
            assert _gathers(programs[release]) == gathers
        params, state = _train(mesh, programs[None], params, state)
    assert bytes_on_first(state.grad_sum) == full // DEVICES
    assert bytes_on_first(params) == full


@only_auto
@every_step
@pytest.mark.parametrize("moments", [True, False], ids=["sums and moments", "sums alone"])
def test_a_release_gathers_and_no_hold_though_nothing_says_so(mesh, step, moments):
    tx = accumulate(K, optax.adam(0.1))
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, P())
        params = jax.device_put(PARAMS, everywhere)
        shardings = divided = state_shardings(tx, params, NamedSharding(mesh, P("data")))
        if not moments:
            shardings = state_shardings(tx, params)._replace(grad_sum=divided.grad_sum)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        x = jax.device_put(BATCHES[0], NamedSharding(mesh, P("data")))
        program = _program(mesh, tx, step, (everywhere, shardings))
        count = (1 if moments else 3) * len(PARAMS)  # parameters, and moments that were divided
        assert _gathers(program.lower(params, state, x).compile()) == (0, count)


@every_step
def test_on_one_device_the_program_is_that_without_shardings(mesh, step):
    """No copy of the state in `init`, nor in a step, nor a temporary for either."""
    types = mesh.axis_types
    alone = jax.make_mesh((1,), ("data",), axis_types=types, devices=jax.devices()[:1])
    tx = accumulate(K, optax.adam(0.1))
    x = BATCHES[0]

    def plain(params, state, x):
        return step(tx, jax.grad(_loss)(params, x), state, params)

    params = jax.device_put(PARAMS, jax.devices()[0])
    state = jax.jit(tx.init)(params)
    expected = jax.jit(plain, donate_argnums=(0, 1)).lower(params, state, x).compile()
    with jax.set_mesh(alone):
        params = jax.device_put(PARAMS, named(alone, SPECS))
        shardings = state_shardings(tx, params)
        init = jax.jit(tx.init, out_shardings=shardings).lower(params).compile()
        state = init(params)
        run = _program(alone, tx, step, (named(alone, SPECS), shardings))
        x = jax.device_put(x, NamedSharding(alone, P("data")))
        program = run.lower(params, state, x).compile()

    def aliased(compiled):
        return compiled.memory_analysis().alias_size_in_bytes

    assert temporaries(init) == 0
    assert temporaries(program) == temporaries(expected)
    assert aliased(program) == aliased(expected)
