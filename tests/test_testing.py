"""What `optaccum.testing` promises: reports, errors, costs, and no findings where all is right."""

import dataclasses
import subprocess
import sys

from helpers import losses, tokens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import transformer
from optaccum.testing import assert_equivalent, check_loss, check_step

CASES, PARAMS, BATCH = losses.CASES, losses.PARAMS, losses.BATCH


def mean(params, x):
    return jnp.mean((x @ params) ** 2)


X, W = jax.random.normal(jax.random.key(0), (8, 3)), jnp.array([1.0, -2.0, 0.5])


def test_importing_the_package_does_not_import_it():
    program = "import sys, optaccum; print([m for m in sys.modules if 'testing' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert "optaccum" not in done.stdout, done.stderr
    assert done.returncode == 0


def test_a_report_is_a_paragraph_with_the_leaf_the_line_and_the_remedy():
    case = CASES["token_mean"]
    text = str(check_loss(case.fun, PARAMS, BATCH, num_microbatches=4))
    for part in ("Not exact", "b['mask']", *case.lines, "`weight=`", "`weight_fn`"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_remedy_for_coupled_rows_is_microbatched():
    report = check_loss(CASES["image_and_text"].fun, PARAMS, BATCH, num_microbatches=4)
    assert "`optaccum.microbatched`" in str(report)


def test_the_weights_are_the_shares_of_the_right_ones():
    report = check_loss(CASES["token_mean"].fun, PARAMS, BATCH, num_microbatches=4)
    counts = np.array([BATCH["mask"][i::4].sum() for i in range(4)])
    # 8 roundings in float32, of which the weights are fitted from gradients of condition 10.
    np.testing.assert_allclose(report.weights, counts / counts.sum(), atol=1e-5)


def test_rows_that_are_stacked_are_followed():
    def loss(params, batch):
        both = jnp.stack([batch["x"] @ params, jnp.sin(batch["x"] @ params)], axis=1)
        return (batch["mask"][:, None] * both**2).sum() / batch["mask"].sum()

    mask = jnp.array([1.0, 0, 1, 1, 0, 0, 1, 1])
    report = check_loss(loss, W, {"x": X, "mask": mask}, num_microbatches=2)
    assert {finding.kind for finding in report.findings} == {"weights", "divisor"}


def test_a_factor_is_measured():
    report = check_loss(CASES["sum_over_rows"].fun, PARAMS, BATCH, num_microbatches=4)
    assert report.scale == pytest.approx(4, abs=1e-4)


def test_structure_takes_two_traces_and_compiles_nothing():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return mean(params, x)

    assert check_loss(counted, W, X).exact
    assert traces == [(8, 3), (16, 3)]


def test_assert_equivalent_raises_the_text_of_the_report():
    assert_equivalent(mean, W, X, num_microbatches=4)
    with pytest.raises(AssertionError, match="sum against mean"):
        assert_equivalent(lambda w, x: jnp.sum((x @ w) ** 2), W, X, num_microbatches=4)


def test_a_tolerance_is_taken():
    def nearly(w, x):
        return jnp.mean((x @ w) ** 2) + 1e-2 * jnp.std(x @ w)

    assert check_loss(nearly, W, X, num_microbatches=4).exact is False
    assert check_loss(nearly, W, X, num_microbatches=4, tolerance=0.1).exact


def test_keys_that_matter_are_stochastic():
    def noisy(w, x, key):
        return jnp.mean((x @ w + jax.random.normal(key, x.shape[:1])) ** 2)

    report = check_loss(noisy, W, X, jax.random.key(0), num_microbatches=4, rng_argnums=2)
    assert (report.exact, report.kind) == (None, "stochastic")
    assert "deterministic" in str(report)

    def unused(w, x, key):
        return mean(w, x)

    assert check_loss(unused, W, X, jax.random.key(0), num_microbatches=4, rng_argnums=2).exact


@pytest.mark.parametrize("num_microbatches", [None, 4])
def test_what_cannot_run_is_unknown(num_microbatches):
    def broken(w, x):
        return jnp.mean(x.reshape(8, 3) @ w) + float(w[0])

    report = check_loss(broken, W, X, num_microbatches=num_microbatches)
    assert (report.exact, report.kind) == (None, "unknown")
    assert "Concretization" in str(report)


def test_another_program_for_twice_the_rows_is_unknown():
    def unrolled(w, x):
        return sum(jnp.sum((row @ w) ** 2) for row in x) / len(x)

    assert check_loss(unrolled, W, X).kind == "unknown"
    assert check_loss(unrolled, W, X, num_microbatches=4).exact


def test_too_few_parameters_are_unknown():
    report = check_loss(lambda w, x: jnp.var(x[:, 0] * w), 2.0, X, num_microbatches=8)
    assert report.exact is not True


def test_low_precision_is_judged_by_its_own_rounding():
    params, batch = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, (PARAMS, BATCH)
    )
    for name in ("cross_entropy_of_all_tokens", "layer_norm"):
        assert check_loss(CASES[name].fun, params, batch, num_microbatches=4).exact, name
    report = check_loss(CASES["token_mean"].fun, params, batch, num_microbatches=4)
    assert report.exact is False


def low_precision(dtype):
    """A right loss: at bfloat16 the gradient of its temperature is off by a tenth and more."""

    def loss(params, batch):
        x, w, t = (a.astype(dtype) for a in (batch["x"], params["w"], params["t"]))
        logits = (jnp.tanh(x @ w) * t).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return loss


def test_rounding_in_low_precision_is_no_mistake():
    keys = jax.random.split(jax.random.key(0), 3)
    batch = {
        "x": jax.random.normal(keys[0], (8, 50, 5)),
        "y": jax.random.randint(keys[1], (8, 50), 0, 7),
    }
    params = {"w": jax.random.normal(keys[2], (5, 7)), "t": jnp.float32(0.7)}
    report = check_loss(low_precision(jnp.bfloat16), params, batch, num_microbatches=4)
    assert (report.exact, report.kind) == (None, "unknown"), report
    assert "float32" in str(report)
    assert check_loss(low_precision(jnp.float32), params, batch, num_microbatches=4).exact

    def summed(params, batch):
        return len(batch["x"]) * low_precision(jnp.bfloat16)(params, batch)

    assert check_loss(summed, params, batch, num_microbatches=4).exact is False


UNEVEN = (jnp.arange(40) < jnp.array([38, 40, 40, 39, 36, 40, 39, 40])[:, None]).astype(jnp.float32)


def uneven_loss(dtype, beside=False):
    """A mean over tokens that nearly all count: as a mean of means it is off by 0.7 %."""

    def loss(params, batch):
        x = batch["x"] if beside else batch["x"].astype(dtype)
        w = params if beside else params.astype(dtype)
        losses = ((x @ w).astype(jnp.float32) - 1) ** 2
        seen = 0 * batch["mask"].astype(dtype).mean().astype(jnp.float32)
        return jnp.sum(batch["mask"] * losses) / batch["mask"].sum() + seen

    return loss


@pytest.mark.parametrize(
    ("loss", "exact"),
    [
        (uneven_loss(jnp.float32), False),
        (uneven_loss(jnp.bfloat16, beside=True), False),
        (uneven_loss(jnp.bfloat16), None),
    ],
    ids=["float32", "bfloat16 beside it", "bfloat16"],
)
def test_low_precision_hides_a_mistake_only_where_gradients_pass(loss, exact):
    x = jax.random.normal(jax.random.key(0), (8, 40, 3)) + 0.3 * jnp.arange(8.0)[:, None, None]
    report = check_loss(loss, jnp.ones(3), {"x": x, "mask": UNEVEN}, num_microbatches=4)
    assert report.exact is exact, report


def test_weights_are_seen_in_low_precision_where_others_would_not_fit():
    batch = {"x": jnp.tile(X[:, None], (1, 40, 1)), "mask": UNEVEN * (jnp.arange(8) < 4)[:, None]}
    batch = jax.tree.map(lambda x: x[jnp.array([0, 1, 4, 5, 2, 6, 7, 3])], batch)

    def tokens(params, batch):
        return batch["mask"].sum()

    report = check_loss(
        uneven_loss(jnp.bfloat16), jnp.ones(3), batch, num_microbatches=4, weight_fn=tokens
    )
    assert report.exact is True, report
    report = check_loss(
        uneven_loss(jnp.bfloat16), jnp.ones(3), batch, num_microbatches=4,
        weight_fn=lambda params, batch: 2 + jnp.abs(batch["x"][0, 0, 0]),
    )  # fmt: skip
    assert (report.exact, report.kind) == (False, "weights"), report


def test_a_loop_that_leaves_a_value_of_each_row_is_followed():
    def chained(w, x):
        def body(carry, row):
            carry = jnp.tanh(carry + row * w)
            return carry, carry.mean()

        return jax.lax.scan(body, jnp.zeros(3), x)[1].mean()

    def alone(w, x):
        return jax.lax.scan(lambda i, row: (i + 1, (row @ w) ** 2), 0, x)[1].mean()

    assert check_loss(chained, W, X).exact is not True
    assert check_loss(alone, W, X).exact is True


@pytest.mark.parametrize("seed", range(6))
def test_a_maximum_over_rows_has_no_count_for_weights(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    batch = {
        "x": jax.random.normal(keys[0], (8, 6, 5)),
        "y": jax.random.randint(keys[1], (8, 6), 0, 7),
    }

    def loss(w, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ w, batch["y"])
        return losses.mean(1).max()

    w = jax.random.normal(keys[2], (5, 7))
    assert check_loss(loss, w, batch, num_microbatches=2).kind == "coupled"


def test_what_these_rows_do_not_show_is_said():
    def clipped(w, x):
        losses = (x @ w) ** 2
        return jnp.minimum(losses, 100 * losses.mean()).mean()

    report = check_loss(clipped, W, X, num_microbatches=2)
    assert (report.exact, report.kind) == (True, None)
    assert {finding.kind for finding in report.findings} == {"batch_statistic"}
    assert "rows that differ more" in str(report)


@pytest.mark.parametrize("num_microbatches", [None, 2])
def test_a_forgotten_batch_argnum_is_in_the_remedy(num_microbatches):
    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    report = check_loss(loss, W, X, jnp.ones(8), num_microbatches=num_microbatches)
    assert report.exact is None
    assert "`batch_argnums`" in str(report.remedy)


def test_a_weight_fn_that_raises_is_in_the_remedy():
    report = check_loss(mean, W, X, num_microbatches=2, weight_fn=lambda x: 1.0)
    assert report.exact is None
    assert "`weight_fn` takes the arguments of `fun`" in str(report.remedy)


def test_devices_that_reduce_are_followed():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")

    def loss(w, x):
        def local(w, x):
            return jax.lax.psum(jnp.sum((x @ w) ** 2), "data")

        total = jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), spec), out_specs=jax.P())(w, x)
        return total / len(x)

    assert check_loss(loss, W, X).exact
    assert check_loss(lambda w, x: jnp.sqrt(loss(w, x)), W, X).kind == "nonlinear"


def test_the_model_of_the_tests_has_no_finding():
    x, mask = tokens.X[0], tokens.MASK[0]

    def weight(params, x, mask):
        return mask.sum()

    report = check_loss(
        tokens.loss_fn, tokens.PARAMS, x, mask, batch_argnums=(1, 2), num_microbatches=4,
        weight_fn=weight,
    )  # fmt: skip
    assert report.exact, report
    unweighted = check_loss(
        tokens.loss_fn, tokens.PARAMS, x, mask, batch_argnums=(1, 2), num_microbatches=4
    )
    assert "mask.sum()" in str(unweighted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_microbatches": 0}, "`num_microbatches` must be >= 1, got 0"),
        ({"num_microbatches": 1}, "`num_microbatches` must be >= 2 to compare with one, got 1"),
        ({"num_microbatches": 3}, "`num_microbatches` 3 does not divide the 8 rows"),
        ({"tolerance": 2.0}, "`tolerance` must lie between 0 and 1, got 2.0"),
        ({"tolerance": "a"}, "`tolerance` must be a scalar"),
        ({"batch_argnums": 4}, "`batch_argnums` names argument 4"),
        ({"weight_fn": 3}, "`weight_fn` must be a function"),
    ],
)
def test_bad_arguments_of_check_loss_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        check_loss(mean, W, X, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_k": 1}, "`every_k` must be >= 2 to compare with one step, got 1"),
        ({"every_k": 3}, "does not divide the 8 rows"),
        ({"every_k": 2, "tolerance": 0.0}, "`tolerance` must lie between 0 and 1, got 0.0"),
        ({"every_k": 2, "tolerance": [0.1]}, "`tolerance` must be a scalar"),
        ({"every_k": 2, "get_params": 3}, "`get_params` must be a function"),
    ],
)
def test_bad_arguments_of_check_step_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        check_step(lambda params, k: None, W, X, **options)


def test_a_step_that_raises_is_unknown():
    report = check_step(lambda w, k: (w, lambda state, x: 1 / 0), W, X, every_k=2)
    assert (report.exact, report.kind) == (None, "unknown")
    assert "ZeroDivisionError" in str(report)


def test_a_step_that_returns_another_state_is_unknown():
    report = check_step(lambda w, k: (w, lambda state, x: {"w": w}), W, X, every_k=2)
    assert "must return the state" in str(report)


@pytest.mark.parametrize(
    "option", [{}, {"tied": False}, {"scanned": True}, {"one_hot": True}], ids=str
)
def test_the_models_of_the_benchmarks_have_no_finding(option):
    model = dataclasses.replace(transformer.PRESETS["100k"], vocabulary=32, width=16, **option)
    params = transformer.make_params(model)
    (batch,) = transformer.make_window(model, 1, 8, 12, ragged=True)
    given = {"num_microbatches": 4, "weight_fn": model.tokens_of}
    report = check_loss(model.mean_loss, *jax.tree.map(jnp.asarray, (params, batch)), **given)
    assert report.exact is True, report
    assert report.findings == ()
