"""The state's layout, written out: a checkpoint written today must load tomorrow.

A change here is a change of format: it belongs in the changelog under "State layout".
"""

import jax
import jax.numpy as jnp
import optax
import pytest

from optaccum import AccumulateState, accumulate, init_noise_scale, update_noise_scale
import optaccum.flax

PARAMS = {"b": jnp.zeros(2, jnp.bfloat16), "w": jnp.zeros((2, 3))}

SCALARS = """
.mini_step int32[]
.gradient_step int32[]
.released bool[]
.skipped int32[]
.weight float32[]
"""
SUMS = """
.grad_sum['b'] float32[2]
.grad_sum['w'] float32[2,3]
"""
ADAM = """
.inner_state[0].count int32[]
.inner_state[0].mu['b'] bfloat16[2]
.inner_state[0].mu['w'] float32[2,3]
.inner_state[0].nu['b'] bfloat16[2]
.inner_state[0].nu['w'] float32[2,3]
"""
AVERAGED = """
.arg_sums['sum_of_value'] float32[]
"""
REDUCED = """
.arg_sums['max_of_logit'] float32[]
.arg_sums['mean_of_router'] float32[3]
.arg_sums['ratio_of_accuracy'][0] float32[]
.arg_sums['ratio_of_accuracy'][1] float32[]
.arg_sums['sum_of_loss'] float32[]
.arg_sums['total_of_load']['experts'] float32[3]
"""
REPORT = """
.skip_state['num_not_finite'] int32[]
.skip_state['should_skip'] bool[]
"""
NOISE = """
.squares float32[]
.weight float32[]
.count float32[]
.trace_sum float32[]
.signal_sum float32[]
.mass float32[]
.gradient_step int32[]
.skipped int32[]
"""

THREE = jnp.ones(3)
METRICS = {
    "loss": "mean",
    "router": ("mean", THREE),
    "load": ("sum", {"experts": jnp.arange(3)}),
    "logit": "max",
    "accuracy": "ratio",
}
VALUES = {"loss": 1.0, "router": THREE, "load": {"experts": THREE}, "logit": 1, "accuracy": (1, 2)}


def _layout(state):
    return [
        f"{jax.tree_util.keystr(path)} {jax.typeof(leaf)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (accumulate(4), SCALARS + SUMS),
        (accumulate(4, optax.adam(0.1)), SCALARS + SUMS + ADAM),
        (accumulate(lambda step: 4, optax.adam(0.1)), SCALARS + SUMS + ADAM),
        (accumulate(jnp.int32(1), optax.adam(0.1)), SCALARS + SUMS + ADAM),
        (accumulate(1, optax.adam(0.1)), SCALARS + ADAM),
        (
            accumulate(
                4,
                optax.adam(0.1),
                should_skip_update_fn=optax.skip_not_finite,
                average_args=("value",),
            ),
            SCALARS + SUMS + AVERAGED + REPORT + ADAM,
        ),
        (accumulate(4, metrics=METRICS), SCALARS + SUMS + REDUCED),
        (accumulate(1, metrics=METRICS), SCALARS + REDUCED),
    ],
    ids=["bare", "adam", "function", "array", "one", "all", "metrics", "metrics of one"],
)
def test_the_state_has_these_leaves(tx, expected):
    lines = [line for line in expected.splitlines() if line]
    state = tx.init(PARAMS)
    assert _layout(state) == lines
    _, state = jax.jit(tx.update)(PARAMS, state, PARAMS, value=1.0, **VALUES)
    assert _layout(state) == lines


def test_the_state_has_these_fields():
    assert AccumulateState._fields == (
        "mini_step",
        "gradient_step",
        "released",
        "skipped",
        "weight",
        "grad_sum",
        "arg_sums",
        "skip_state",
        "inner_state",
    )
    state = accumulate(1, optax.sgd(0.1)).init(PARAMS)
    assert (state.grad_sum, state.arg_sums, state.skip_state) == ((), {}, ())


def test_the_noise_scale_has_these_leaves():
    noise, tx = init_noise_scale(), accumulate(1)
    assert _layout(noise) == NOISE.split("\n")[1:-1]
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    assert _layout(jax.jit(update_noise_scale)(noise, PARAMS, state)) == _layout(noise)


def test_a_train_state_has_these_leaves():
    tx = accumulate(4, optax.sgd(0.1))
    state = optaccum.flax.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    state = jax.jit(lambda state: state.apply_gradients(grads=PARAMS))(state)
    own = """
.step ~int32[]
.params['b'] bfloat16[2]
.params['w'] float32[2,3]
"""
    inside = "".join(f".opt_state{line}\n" for line in (SCALARS + SUMS).splitlines() if line)
    assert _layout(state) == (own + inside).strip().splitlines()


def test_a_train_state_with_a_collection_to_overwrite_has_these_leaves():
    params = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.ones(1)}}
    tx = accumulate(1, optax.sgd(0.1))
    state = optaccum.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
    assert _layout(state.opt_state) == [
        ".largest['scale'] float32[1]",
        *(f".opt_state{line}" for line in SCALARS.splitlines() if line),
    ]
