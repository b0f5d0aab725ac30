"""The shardings of a state: like the parameters where it is like them, replicated elsewhere."""

import functools
import re

from flax import linen as nn, nnx
from helpers.fp8 import OWG, Fp8, input_history
from helpers.hlo import collectives
from helpers.meshes import DEVICES, bytes_on_first, named, only_auto
from helpers.optimizers import OPTIMIZERS, build
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optaccum
from optaccum import accumulate, apply_gradients, get_state, state_shardings
import optaccum.flax
from optaccum.flax import TrainState

K = 2
PARAMS = {
    "w": np.linspace(-1, 1, 512, dtype=np.float32).reshape(8, 64),
    "b": np.zeros(64, np.float32),
}
SPECS = {"w": P("data", None), "b": P("data")}

ADAM = optax.adam(0.1)
AROUND_AND_INSIDE = {
    "alone": accumulate(K, ADAM),
    "one": accumulate(1, ADAM),
    "skip, averages": accumulate(
        K, ADAM, should_skip_update_fn=optax.skip_not_finite, average_args=("value",)
    ),
    "chain": optax.chain(optax.clip(1.0), accumulate(K, ADAM)),
    "masked": optax.masked(accumulate(K, ADAM), {"w": True, "b": False}),
    "masked inside": accumulate(K, optax.masked(ADAM, {"w": False, "b": True})),
    "partition": optax.partition(
        {"a": accumulate(K, ADAM), "s": optax.sgd(0.1, momentum=0.9)}, {"w": "a", "b": "s"}
    ),
    "partition inside": accumulate(
        K, optax.partition({"a": ADAM, "s": optax.sgd(0.1)}, {"w": "a", "b": "s"})
    ),
    "injected": optax.inject_hyperparams(accumulate)(every_k=K, inner=ADAM),
    "no accumulate": ADAM,
    **{name: accumulate(K, build(name)) for name in OPTIMIZERS},
}


@only_auto
@pytest.mark.parametrize("tx", AROUND_AND_INSIDE.values(), ids=AROUND_AND_INSIDE)
def test_every_leaf_lies_like_its_parameter_or_everywhere(mesh, tx):
    shapes = jax.eval_shape(tx.init, PARAMS)
    specs = state_shardings(tx, PARAMS, SPECS)
    placed = state_shardings(tx, PARAMS, named(mesh, SPECS))
    assert jax.tree.structure(specs) == jax.tree.structure(placed) == jax.tree.structure(shapes)
    assert jax.tree.map(lambda s: s.spec, placed) == specs
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, x), spec in zip(leaves, jax.tree.leaves(specs), strict=True):
        owner = re.search(r"\['(w|b)'\]", jax.tree_util.keystr(path))
        if owner and x.shape == PARAMS[owner[1]].shape:
            assert spec == SPECS[owner[1]], path
        elif owner and x.shape[1:] == PARAMS[owner[1]].shape:
            assert spec == P(None, *SPECS[owner[1]]), path
        else:
            assert spec == P(), path


@only_auto
def test_the_shardings_are_what_jit_gives(mesh):
    tx = optax.chain(optax.clip(1.0), accumulate(K, optax.adafactor(0.1)))
    params = jax.device_put(PARAMS, named(mesh, SPECS))
    shardings = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    assert jax.tree.map(lambda x: x.sharding.spec, get_state(state).grad_sum) == SPECS


def test_masked_synced_and_stacked_leaves_are_found():
    params = {
        "body": {"w": jnp.ones((8, 4)), "b": jnp.ones(4)},
        "head": jnp.ones((8, 2)),
        "no": None,
    }
    specs = {"body": P("data"), "head": P(None, "model"), "no": None}
    specs["body"] = {"w": P("data", None), "b": P()}
    masked = accumulate(
        K,
        optax.masked(
            optax.lbfgs(memory_size=3, linesearch=None), {"body": True, "head": False, "no": False}
        ),
    )
    found = state_shardings(masked, params, specs)
    assert found.grad_sum == specs
    memory = found.inner_state.inner_state[0].diff_params_memory
    assert memory["body"] == {"w": P(None, "data", None), "b": P(None)}
    assert memory["head"] == optax.MaskedNode()
    assert found.inner_state.inner_state[0].params["body"] == specs["body"]

    tx = accumulate(K, optax.lookahead(optax.sgd(0.1, momentum=0.9), 2, 0.5))
    synced = optax.LookaheadParams.init_synced(params)
    for wanted in (specs, optax.LookaheadParams(specs, specs)):
        found = state_shardings(tx, synced, wanted)
        assert found.grad_sum == found.inner_state.fast_state[0].trace == specs


@only_auto
def test_a_checkpoint_is_restored_where_it_shall_lie(mesh, tmp_path):
    """The template that it is restored into holds no array."""
    tx = accumulate(K, optax.adam(0.1))
    create = functools.partial(TrainState.create, apply_fn=None, tx=tx)
    state = create(params=PARAMS).apply_gradients(grads=PARAMS, weight=2.0)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: create(params=PARAMS))
        wanted = shapes.replace(
            step=NamedSharding(mesh, P()),
            params=named(mesh, SPECS),
            opt_state=state_shardings(tx, shapes.params, named(mesh, SPECS)),
        )
        template = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, wanted
        )
        restored = checkpointer.restore(tmp_path / "state", template)
    assert jax.tree.map(lambda x: x.sharding, restored) == wanted
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_specs_are_those_of_shard_map(mesh):
    """One member a device: everything that belongs to its parameters varies."""
    tx = accumulate(K, optax.sgd(1.0, momentum=0.5))
    params = jnp.zeros((DEVICES, 3))
    grads = jnp.arange(DEVICES * 3.0).reshape(DEVICES, 3)
    specs = state_shardings(tx, params, P("data"))
    mapped = jax.shard_map(
        functools.partial(apply_gradients, tx),
        mesh=mesh,
        in_specs=(P("data"), specs, P("data")),
        out_specs=(P("data"), specs),
    )
    with jax.set_mesh(mesh):
        params, grads = jax.device_put((params, grads), NamedSharding(mesh, P("data")))
        state = jax.device_put(tx.init(params), named(mesh, specs))
        for _ in range(K):
            params, state = jax.jit(mapped)(grads, state, params)
    np.testing.assert_array_equal(params, -grads)
    assert bytes_on_first(state.inner_state[0].trace) == 3 * 4


def _meshes():
    devices = jax.devices()
    return (jax.sharding.Mesh(np.asarray(d), ("data",)) for d in (devices[:4], devices[4:8]))


def test_python_numbers_are_replicated():
    counting = optax.GradientTransformation(
        lambda params: {"count": 0, "rate": 0.5},
        lambda updates, state, params=None: (updates, state),
    )
    assert state_shardings(counting, PARAMS, SPECS) == {"count": P(), "rate": P()}


def test_what_is_no_sharding_is_refused():
    tx, spec = accumulate(K, optax.adam(0.1)), P()
    missing = {"w": spec}
    for wanted in (missing, {**SPECS, "c": spec}, [spec, spec], {"w": {"x": spec}, "b": spec}):
        with pytest.raises(ValueError, match=r"`shardings` must be a tree like `params`, or a pre"):
            state_shardings(tx, PARAMS, wanted)
    for bad in (None, "data", jax.devices()[0]):
        message = rf"leaf \['b'\] must be a NamedSharding or a PartitionSpec, got {bad!r}"
        with pytest.raises(TypeError, match=message.replace("(", r"\(").replace(")", r"\)")):
            state_shardings(tx, PARAMS, {"w": spec, "b": bad})
    for params in (PARAMS, jax.eval_shape(lambda: PARAMS), jax.tree.map(jnp.asarray, PARAMS)):
        with pytest.raises(TypeError, match=r"leaf \['b'\] must be.*; pass `shardings`"):
            state_shardings(tx, params)
    with pytest.raises(TypeError, match=r"`tx` must"):
        state_shardings(optax.adam, PARAMS, spec)


def test_two_meshes_are_refused():
    tx = accumulate(K, optax.adam(0.1))
    a, b = (NamedSharding(mesh, P()) for mesh in _meshes())
    for other in (b, P()):
        with pytest.raises(
            ValueError, match=r"leaf \['w'\] is over .*; use one mesh, or specs only"
        ):
            state_shardings(tx, PARAMS, {"b": a, "w": other})


@pytest.mark.parametrize("inner", [optax.lbfgs(), optax.scale_by_lbfgs()])
def test_the_history_of_lbfgs_lies_like_its_parameters(inner):
    """Its history is of the parameters' shapes with an axis in front; some leaves are scalars."""
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    specs = {"w": jax.P("data", None), "b": jax.P()}
    tx = accumulate(2, inner)
    placed = optaccum.state_shardings(tx, params, specs)
    state = tx.init(params)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert len(s) <= x.ndim
    history = optax.tree.get(placed, "diff_params_memory")
    assert history["w"] == jax.P(None, "data", None)
    assert placed.grad_sum == specs


# Flax's train states: sums and moments lie like the parameters, and stay so.


ROWS, WIDTH = 16, 16
X = jax.random.normal(jax.random.key(1), (2 * K, ROWS, WIDTH))
INNER = optax.adam(0.1, eps=1e-2)
TX = accumulate(K, INNER)


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


@only_auto
def test_a_linen_train_state_lies_like_its_parameters(mesh):
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


@only_auto
@pytest.mark.parametrize("ours", [True, False], ids=["state_shardings", "flax.linen.get_sharding"])
def test_boxed_parameters_say_where_their_sums_lie(mesh, ours):
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


@only_auto
def test_a_collection_to_overwrite_is_replicated(mesh):
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


@only_auto
@pytest.mark.parametrize("jitted", [False, True])
def test_an_nnx_optimizer_lies_like_its_parameters(mesh, jitted):
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


@only_auto
def test_variables_of_nnx_may_be_parameters(mesh):
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
