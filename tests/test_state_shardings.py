"""The shardings of a state: like the parameters where it is like them, replicated elsewhere."""

import functools
import re

from helpers.meshes import DEVICES, bytes_on_first, named, only_auto
from helpers.optimizers import OPTIMIZERS, build
from helpers.steps import every_step
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from optaccum import accumulate, get_state, state_shardings
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


def test_subtrees_masked_lookahead_and_stacked_leaves():
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
def test_a_flax_train_state_from_a_checkpoint(mesh, tmp_path):
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


@every_step
def test_specs_of_shard_map(mesh, step):
    """One member a device: everything that belongs to its parameters varies."""
    tx = accumulate(K, optax.sgd(1.0, momentum=0.5))
    params = jnp.zeros((DEVICES, 3))
    grads = jnp.arange(DEVICES * 3.0).reshape(DEVICES, 3)
    specs = state_shardings(tx, params, P("data"))
    mapped = jax.shard_map(
        functools.partial(step, tx),
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


def test_a_state_of_python_numbers():
    counting = optax.GradientTransformation(
        lambda params: {"count": 0, "rate": 0.5},
        lambda updates, state, params=None: (updates, state),
    )
    assert state_shardings(counting, PARAMS, SPECS) == {"count": P(), "rate": P()}


def test_what_is_no_sharding():
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


def test_two_meshes():
    tx = accumulate(K, optax.adam(0.1))
    a, b = (NamedSharding(mesh, P()) for mesh in _meshes())
    for other in (b, P()):
        with pytest.raises(
            ValueError, match=r"leaf \['w'\] is over .*; use one mesh, or specs only"
        ):
            state_shardings(tx, PARAMS, {"b": a, "w": other})
