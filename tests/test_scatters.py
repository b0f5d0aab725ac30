"""Gradients of lookups on compilers that lose them: what is traced, and what is lowered for whom.

`test_accelerators.py` has what the compilers of chips make of it.
"""

import re

from helpers import meshes
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest

from optaccum import _fold, _scatters as scatters, microbatched, value_and_grad
from optaccum.testing import check_loss

IDS = jnp.arange(64).reshape(16, 4) % 7
ROWS = {"ids": IDS, "x": jnp.sin(jnp.arange(16 * 4 * 8.0)).reshape(16, 4, 8)}
PARAMS = {
    "table": jnp.cos(jnp.arange(7 * 8.0)).reshape(7, 8),
    "stack": jnp.cos(jnp.arange(3 * 7 * 8.0)).reshape(3, 7, 8),
    "dense": jnp.eye(8) + 0.1,
}


@pytest.fixture
def affected(monkeypatch):
    """The program as it is for versions with the fault, whichever is installed."""
    monkeypatch.setattr(scatters, "VERSION", scatters.AFFECTED[0])


def lookup(params, rows):
    return jnp.mean(jnp.tanh(params["table"][rows["ids"]] @ params["dense"]) * rows["x"])


def tied(params, rows):
    hidden = params["table"][rows["ids"]] * rows["x"]
    return jnp.mean(jnp.tanh(hidden @ params["dense"]) @ params["table"].T)


def cast(params, rows):
    table = params["table"].astype(jnp.bfloat16).T.reshape(8, 7).T
    return jnp.mean(table[rows["ids"]].astype(jnp.float32) * rows["x"] @ params["dense"])


def layers(params, rows):
    """Each layer has a table of its own, and all share one."""

    def layer(hidden, table):
        looked_up = table[rows["ids"]] * params["table"][rows["ids"]]
        return jnp.tanh(hidden @ params["dense"]) + looked_up, None

    return jnp.mean(lax.scan(jax.checkpoint(layer), rows["x"], params["stack"])[0] ** 2)


def of_length_one(params, rows):
    """XLA makes a reshape of a sum over one element, and a product of elements of a dot product."""
    table = jnp.einsum("vd,d->vd", jnp.sum(params["table"][None], 0), jnp.ones(8))[::-1]
    return jnp.mean(jnp.squeeze(table[:, None])[rows["ids"]] * rows["x"])


def added_up(params, rows):
    """No parameter's gradient holds a scatter: all elements of a scatter are added up."""
    hidden = jnp.cumsum(rows["x"] @ params["dense"], axis=1).at[:, rows["ids"][0]].get()
    return jnp.mean((hidden * params["table"][0])[:, None])


def dense(params, rows):
    return jnp.mean((rows["x"] @ params["dense"]) ** 2)


HOLD = {
    lookup: {"table"},
    tied: {"table"},
    cast: {"table"},
    layers: {"table", "stack"},
    of_length_one: {"table"},
    added_up: set(),
    dense: set(),
}
losses = pytest.mark.parametrize("loss", HOLD, ids=lambda loss: loss.__name__)


def _holds(fun):
    """Returns which leaves of `fun()` hold a scatter."""
    found = []
    jax.eval_shape(lambda: found.append(scatters.trace(fun)[1]))
    return found[0]


@losses
def test_the_leaves_that_hold_a_scatter_are_found(affected, loss):
    holds = _holds(lambda: jax.grad(loss)(PARAMS, ROWS))
    assert {name for name, one in zip(sorted(PARAMS), holds, strict=True) if one} == HOLD[loss]


def test_scatters_in_loops_branches_and_functions_are_found(affected):
    def branch(x):
        return lax.cond(jnp.sum(x) > 0, lambda: x.at[IDS[0]].add(1.0), lambda: x)

    def loop(x):
        return lax.fori_loop(0, 3, lambda _, y: jax.jit(branch)(y) * 2, x)

    def handed_on(x):  # the second trip is given a scatter
        def trip(pair, _):
            return (pair[1], x.at[IDS[0]].add(1.0)), None

        return lax.scan(trip, (x, x), None, length=2)[0][0]

    zeros = jnp.zeros(7)
    for fun in (branch, loop, handed_on, lambda x: lax.while_loop(jnp.all, branch, x)):
        assert _holds(lambda fun=fun: fun(zeros)) == [True]
    assert _holds(lambda: jnp.zeros(7).at[IDS[0]].add(1.0) @ jnp.ones((7, 2))) == [False]


def test_a_class_that_takes_arrays_alone_can_hold_parameters_and_results(affected):
    @jax.tree_util.register_pytree_node_class
    class Strict:
        def __init__(self, x):
            assert isinstance(x, jax.Array) or type(x) is object
            self.x = x

        def tree_flatten(self):
            return (self.x,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    def loss(params, rows):
        value = lookup({"table": params.x, "dense": PARAMS["dense"]}, rows)
        return value, Strict(2 * value)

    run = value_and_grad(loss, has_aux=True, num_microbatches=4)
    (_, aux), grads = jax.jit(run)(Strict(PARAMS["table"]), ROWS)
    assert aux.x.shape == (4,)
    wanted = jax.grad(lookup)(PARAMS, ROWS)["table"]
    np.testing.assert_allclose(grads.x, wanted, atol=1e-7)


def test_a_loss_may_read_its_arguments_where_nothing_is_traced(affected):
    seen = []

    def loss(params, rows):
        value = lookup(params, rows)
        seen.append(float(rows["x"][0, 0, 0]))
        return value if value < 1e9 else 2 * value

    wanted = jax.value_and_grad(lookup)(PARAMS, ROWS)
    once = value_and_grad(loss, num_microbatches=1)(PARAMS, ROWS)
    with jax.disable_jit():
        four = value_and_grad(loss, num_microbatches=4)(PARAMS, ROWS)
    assert seen == [float(x) for x in ROWS["x"][[0, 0, 1, 2, 3], 0, 0]]
    for found in (once, four):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, wanted)


@losses
def test_fences_change_no_bit(monkeypatch, loss):
    weighted, run = (
        value_and_grad(loss, num_microbatches=4, weight_fn=weight_fn)
        for weight_fn in (lambda _, rows: jnp.sum(rows["ids"]), None)
    )

    def coupled(params, rows):
        def encode(params, rows):
            return loss(params, rows)[None] + jnp.zeros(len(rows["ids"]))

        return jnp.var(microbatched(encode, num_microbatches=4)(params, rows))

    # With the fault, stacks that hold a scatter are added behind their scan.
    monkeypatch.setattr(_fold, "_can_hold_slices", lambda *_: False)
    found = []
    for version in (scatters.AFFECTED[0], scatters.AFFECTED[1]):
        monkeypatch.setattr(scatters, "VERSION", version)
        everything = jax.jit(lambda p, r: (run(p, r), weighted(p, r), jax.grad(coupled)(p, r)))
        found.append(everything(PARAMS, ROWS))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_versions_that_are_right_trace_what_they_did(monkeypatch):
    monkeypatch.setattr(scatters, "VERSION", scatters.AFFECTED[1])
    program = str(jax.make_jaxpr(value_and_grad(layers, num_microbatches=4))(PARAMS, ROWS))
    assert "scatters" not in program


def _lowered(platform, mesh, loss=layers, **options):
    """Returns the program for a platform, lowered without its compiler."""
    run = value_and_grad(loss, num_microbatches=4, **options)
    places = meshes.named(mesh, (P(), P("data")))
    step = jax.jit(run, in_shardings=places)
    return step.trace(PARAMS, ROWS).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("devices", [1, 8])
def test_only_programs_of_several_chips_have_fences(affected, platform, devices):
    mesh = meshes.make_mesh(AxisType.Auto, devices)
    # Beside the fence of `jax.checkpoint`.
    fences = _lowered(platform, mesh).count("optimization_barrier") - 1
    assert fences == (1 if platform != "cpu" and devices > 1 else 0)


@meshes.needs_reshard  # older versions print programs in another way
def test_only_lookups_are_selected(affected):
    """By a predicate that no compiler knows."""
    mesh = meshes.make_mesh(AxisType.Auto)
    found = [
        bool(re.search(r"compare +GE, %\w+, %\w+, FLOAT", _lowered("tpu", mesh, loss)))
        for loss in (lookup, dense)
    ]
    assert found == [True, False]


@pytest.mark.parametrize(
    ("loss", "devices"),
    [*((loss, 1) for loss in HOLD), (layers, 8)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_cpus_run_the_program_that_they_ran(monkeypatch, loss, devices):
    """There the predicate is a constant, and the count of trips is not needed."""
    monkeypatch.setattr(_fold, "_can_hold_slices", lambda *_: False)
    places = meshes.named(meshes.make_mesh(AxisType.Auto, devices), (P(), P("data")))
    found = []
    for version in scatters.AFFECTED:
        monkeypatch.setattr(scatters, "VERSION", version)
        run = jax.jit(value_and_grad(loss, num_microbatches=2), in_shardings=places)
        text = run.lower(PARAMS, ROWS).compile().as_text()
        found.append(sorted(re.findall(r" = (\S+) ([a-z][\w\-]*)\(", text)))
    assert found[0] == found[1]


def test_a_shard_map_is_left_alone(affected):
    """There gradients are each device's own, and nothing is partitioned."""
    mesh = meshes.make_mesh(AxisType.Auto)
    run = value_and_grad(layers, num_microbatches=2, reduce_axes="data")
    step = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    text = jax.jit(step).trace(PARAMS, ROWS).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("optimization_barrier") == 1  # of `jax.checkpoint`
    loss, grads = jax.jit(step)(PARAMS, ROWS)
    wanted, wanted_grads = jax.value_and_grad(layers)(PARAMS, ROWS)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), grads, wanted_grads)


def test_what_a_loss_hands_on_is_fenced(affected):
    """Counts that it scatters into its carry, for example."""

    def loss(params, counts, rows):
        counts = counts.at[rows["ids"]].add(1)
        return lookup(params, rows), (counts, ())

    run = value_and_grad(loss, has_aux=True, num_microbatches=4, batch_argnums=2, carry_argnum=1)
    places = meshes.named(meshes.make_mesh(AxisType.Auto), (P(), P(), P("data")))
    step = jax.jit(run, in_shardings=places)
    traced = step.trace(PARAMS, jnp.zeros(7, jnp.int32), ROWS)
    assert "optimization_barrier" in traced.lower(lowering_platforms=("tpu",)).as_text()
    (_, (counts, _)), _ = step(PARAMS, jnp.zeros(7, jnp.int32), ROWS)
    np.testing.assert_array_equal(counts, np.bincount(IDS.ravel(), minlength=7))


def test_a_lookup_can_be_differentiated_twice_mapped_and_traced_once(affected):
    calls = []

    def loss(params, rows):
        calls.append(0)
        return layers(params, rows)

    run = value_and_grad(loss, num_microbatches=4)
    jax.make_jaxpr(run)(PARAMS, ROWS)
    assert len(calls) == 1
    tangents = jax.jvp(lambda p: run(p, ROWS)[1], (PARAMS,), (PARAMS,))[1]
    wanted = jax.jvp(lambda p: jax.grad(layers)(p, ROWS), (PARAMS,), (PARAMS,))[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), tangents, wanted)
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    mapped = jax.vmap(lambda p: run(p, ROWS)[1])(several)
    wanted = jax.vmap(lambda p: jax.grad(layers)(p, ROWS))(several)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), mapped, wanted)


def _on_eight_devices():
    mesh = meshes.make_mesh(AxisType.Auto)
    put = jax.device_put
    params = put(PARAMS, meshes.named(mesh, {name: P() for name in PARAMS}))
    return params, put(ROWS, meshes.named(mesh, P("data")))


def test_check_loss_runs_the_loop_where_the_arrays_lie():
    """So on chips it sees what their compilers do: the arguments of each program are sharded."""
    params, rows = _on_eight_devices()
    seen = []

    def loss(params, rows):
        jax.debug.inspect_array_sharding(params["table"], callback=lambda s: seen.append(("p", s)))
        jax.debug.inspect_array_sharding(rows["x"], callback=lambda s: seen.append(("x", s)))
        return lookup(params, rows)

    assert check_loss(loss, params, rows, num_microbatches=2).exact
    assert all(len(s.device_set) == 8 for _, s in seen)
    assert all(s.is_fully_replicated == (name == "p") for name, s in seen)


def test_check_loss_names_the_compiler_if_the_loop_forgets(monkeypatch):
    """Emulated: the sums of all but the last microbatch are lost."""
    from optaccum import _window as window

    add = window.add
    monkeypatch.setattr(
        window,
        "add",
        lambda sums, *rest, **kwargs: add(jax.tree.map(jnp.zeros_like, sums), *rest, **kwargs),
    )
    report = check_loss(lookup, *_on_eight_devices(), num_microbatches=2)
    assert (report.exact, report.kind) == (False, "compiler")
    assert "49143" in str(report)
    assert (report.error or 0) > 0.1
