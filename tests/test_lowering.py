"""What the compiled program does: nothing here measures time."""

import functools
import re
from typing import Any

from helpers import meshes, tokens
from helpers.hlo import temporaries
from helpers.steps import every_step, update_and_apply
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import optax
import pytest

from benchmarks import hlo
import optaccum
from optaccum import accumulate, apply_gradients, init_noise_scale, update_noise_scale

LEAVES = 6
PARAMS = {f"w{i}": jnp.full((128, 128), 0.1 * (i + 1)) for i in range(LEAVES)}
PARAMETER_BYTES = sum(p.nbytes for p in PARAMS.values())
# The scalars of the state, and the few hundred bytes that XLA aligns them to.
SCALARS = 4096
LION = optax.lion(0.1)


def _compile(tx, step=apply_gradients, *, weighted=False, **static):
    """Compiles a donated step that takes and returns (params, state) in one order."""

    def run(params, state, grads, extra):
        return step(tx, grads, state, params, **extra, **static)

    extra = {"weight": 1.0} if weighted else {}
    state = tx.init(PARAMS)
    return jax.jit(run, donate_argnums=(0, 1)).lower(PARAMS, state, PARAMS, extra).compile()


@pytest.mark.parametrize(
    "inner",
    [optax.sgd(0.1, momentum=0.9), optax.adamw(0.1), LION],
    ids=["sgd", "adamw", "lion"],
)
def test_apply_gradients_has_no_more_temporaries_than_the_inner_optimizer(inner):
    """None for sgd and adamw; lion itself needs its old momentum beside the new one."""
    alone = temporaries(_compile(inner, update_and_apply))
    assert temporaries(_compile(accumulate(64, inner))) <= alone + SCALARS
    assert alone < (2 * PARAMETER_BYTES if inner is LION else SCALARS)


def test_update_has_its_updates_as_its_only_temporary():
    found = temporaries(_compile(accumulate(4, optax.adamw(0.1)), update_and_apply))
    assert PARAMETER_BYTES <= found < PARAMETER_BYTES + SCALARS


@pytest.mark.parametrize(
    ("use_grad_mean", "skip", "weighted"),  # each pair of values at once
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
)
def test_options_need_no_more_temporaries_than_what_they_call(use_grad_mean, skip, weighted):
    skip_fn = functools.partial(optax.skip_large_updates, max_squared_norm=1e9)
    norm = jax.jit(skip_fn).lower(PARAMS, jnp.int32(0), None).compile()
    tx = accumulate(
        4,
        optax.adamw(0.1),
        use_grad_mean=use_grad_mean,
        should_skip_update_fn=skip_fn if skip else None,
    )
    alone = temporaries(norm) if skip else 0
    assert temporaries(_compile(tx, weighted=weighted)) <= alone + SCALARS


def test_donated_arguments_that_are_returned_in_another_order_are_copied():
    """Why the docstring of `apply_gradients` says in which order to return them."""

    def crossed(state, params, grads):
        return apply_gradients(tx, grads, state, params)

    tx = accumulate(4, optax.adamw(0.1))
    compiled = jax.jit(crossed, donate_argnums=(0, 1)).lower(tx.init(PARAMS), PARAMS, PARAMS)
    assert temporaries(compiled.compile()) > PARAMETER_BYTES


def test_multi_steps_has_three_temporaries():
    """The incumbent, by the same measure: so the measure sees temporaries."""
    assert temporaries(_compile(optax.MultiSteps(optax.adamw(0.1), 4), update_and_apply)) > (
        2.5 * PARAMETER_BYTES
    )


@pytest.mark.parametrize("release", [True, False])
def test_a_static_release_has_no_conditional_and_no_temporary(release):
    compiled = _compile(accumulate(4, optax.adamw(0.1)), release=release)
    assert " conditional(" not in compiled.as_text()
    assert temporaries(compiled) < SCALARS


@every_step
def test_every_k_of_one_compiles_to_the_inner_optimizer(step):
    def flops(tx):
        return _compile(tx, step).cost_analysis()["flops"]

    # A few scalar operations on the counters, against seven operations an element.
    assert flops(accumulate(1, optax.adamw(0.1))) - flops(optax.adamw(0.1)) < 100


@every_step
@pytest.mark.parametrize(
    ("platform", "loop"), [("cpu", False), ("tpu", False), ("cuda", True), ("rocm", True)]
)
def test_each_chip_gets_the_form_that_it_updates_in_place(step, platform, loop):
    def inner_update(updates, state, params=None):
        return jax.tree.map(jnp.cos, updates), state

    inner = optax.GradientTransformation(optax.init_empty_state, inner_update)
    tx = accumulate(4, inner)
    traced = jax.jit(functools.partial(step, tx)).trace(PARAMS, tx.init(PARAMS), PARAMS)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == loop
    assert text.count("stablehlo.cosine") == LEAVES


@every_step
def test_the_inner_optimizer_is_traced_once(step):
    traces = []

    def inner_update(updates, state, params=None):
        traces.append(len(traces))
        return updates, state

    tx = accumulate(4, optax.GradientTransformation(optax.init_empty_state, inner_update))
    jax.make_jaxpr(functools.partial(step, tx))(PARAMS, tx.init(PARAMS), PARAMS)
    assert traces == [0]


def test_eager_holds_of_apply_gradients_do_not_trace_the_inner_optimizer():
    traces = []

    def inner_update(updates, state, params=None):
        traces.append(len(traces))
        return updates, state

    tx = accumulate(9, optax.GradientTransformation(optax.init_empty_state, inner_update))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(8):
        params, state = apply_gradients(tx, PARAMS, state, params)
    assert traces == []


def test_the_program_does_not_grow_with_k():
    programs = [_compile(accumulate(k, optax.adamw(0.1))).as_text() for k in (2, 1000)]
    # Nothing but the constant differs.
    few, many = (re.findall(r" = \S+ ([\w-]+)\(", program) for program in programs)
    assert few == many
    assert len(few) > 100


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older XLA for CPUs fuses less")
def test_measuring_the_noise_reads_gradients_and_sums_once_more():
    """The norm of the mean is that of the sums: the mean is not written for it."""
    tx = accumulate(4, optax.adamw(0.1))

    def step(params, state, noise, grads, weight):
        params, state = apply_gradients(tx, grads, state, params, weight=weight)
        return params, state, update_noise_scale(noise, grads, state, weight=weight)

    args = PARAMS, tx.init(PARAMS), init_noise_scale(), PARAMS, 1.0
    measured = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*args).compile()
    for compiled, hold, release in ((_compile(tx), 3, 13), (measured, 4, 15)):
        found = hlo.moved(compiled.as_text())
        sizes = [x / PARAMETER_BYTES for x in (found.hold, found.release)]
        assert sizes == [pytest.approx(hold, abs=0.1), pytest.approx(release, abs=0.1)]
    assert temporaries(measured) <= SCALARS


# What a profile shows.


def _scopes(fun, *args):
    """Returns the paths of our scopes in the metadata of a lowered program."""
    module: Any = jax.jit(fun).lower(*args).compiler_ir("stablehlo")
    text = module.operation.get_asm(enable_debug_info=True, large_elements_limit=8)
    ours = r"optaccum\.(?:add|reduce|release|hold)\b"  # and not modules, which JAX may name, too
    paths = (re.findall(ours, path) for path in re.findall(r'loc\("([^"]*)"', text))
    return {"/".join(path) for path in paths if path}


def _layers_loss(params, x):
    return jnp.mean(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0] ** 2)


TX = accumulate(2, optax.adam(0.1))
IN_TWO = {"num_microbatches": 2}


def _of_rows(w, x):
    return jnp.var(optaccum.microbatched(lambda w, x: x @ w, **IN_TWO)(w, x))


ADDS, HOLDS, RELEASES = "optaccum.add", "optaccum.hold", "optaccum.release"


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        pytest.param(lambda p, s, x: TX.update(p, s, p), {ADDS, HOLDS, RELEASES}, id="update"),
        pytest.param(lambda p, s, x: apply_gradients(TX, p, s, p), {ADDS, RELEASES}, id="apply"),
        pytest.param(optaccum.value_and_apply(TX, _layers_loss), {ADDS, RELEASES}, id="loss"),
        pytest.param(
            lambda p, s, x: optaccum.value_and_grad(_layers_loss, **IN_TWO)(p, x),
            {ADDS},
            id="value_and_grad",
        ),
        pytest.param(
            lambda p, s, x: jax.grad(_of_rows)(p[0, 0], x),
            {ADDS},
            id="microbatched",
        ),
    ],
)
def test_a_profile_names_the_parts_of_a_call(fun, expected):
    params = jnp.ones((3, 4, 4))
    assert _scopes(fun, params, TX.init(params), jnp.ones((2, 4))) == expected


def test_a_profile_names_the_reduction_inside_of_the_release():
    mesh = meshes.make_mesh(AxisType.Auto)
    tx = accumulate(tokens.K, tokens.INNER, reduce_axes="data", metrics=("value",))
    with jax.set_mesh(mesh):
        init, step = tokens.make_programs(tx, mesh)
        found = _scopes(step, tokens.PARAMS, init(tokens.PARAMS), tokens.X[0], tokens.MASK[0])
    assert {"optaccum.add", "optaccum.reduce", "optaccum.release/optaccum.reduce"} <= found
