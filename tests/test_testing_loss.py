"""`check_loss` says of losses from public bugs and papers whether they accumulate, and why not."""

import dataclasses
import itertools

from helpers import losses, reported
from helpers.losses import BATCH, CASES, PARAMS, N
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import transformer
from optaccum import microbatched, value_and_grad
from optaccum.testing import assert_equivalent, check_loss

X, W = jax.random.normal(jax.random.key(0), (8, 3)), jnp.array([1.0, -2.0, 0.5])

# The first loss of each kind, which it is to keep. They take turns with what is added to them.
FIRST = {(case.kind, case.structure): name for name, case in reversed(CASES.items())}
CHANGED = [
    name for name in CASES if name in FIRST.values() and losses.mutate(CASES[name], "weight")
]
# Losses with the numbers of another one, here or in `helpers.reported`. Only lines are checked.
ALSO_JUDGED = {
    "batch_norm", "divided_before_it_is_summed", "divided_by_a_fixed_batch_size",
    "divided_by_a_root", "divisor_in_a_scan", "hardest_examples", "load_balance",
    "mixed_with_the_reversed_batch", "normalized_advantage", "sum_over_rows",
    "token_mean_in_a_nested_jit", "value_at_risk", "worst_row",
}  # fmt: skip
MUTATIONS = list(zip(itertools.cycle(("weight", "factor", "coupled")), CHANGED))


def check(case, num_microbatches):
    options = dict(case.options)
    batch = options.pop("batch", BATCH)
    return check_loss(case.fun, PARAMS, batch, num_microbatches=num_microbatches, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in ALSO_JUDGED])
def test_numbers_give_the_verdict(name):
    case = CASES[name]
    report = check(case, N)
    assert report.kind == case.kind, report
    assert report.exact is (True if case.kind is None else report.exact is None and None)
    if case.source is not None:
        assert case.source in (report.remedy or "")
    if case.lines and case.kind is not None:
        assert report.findings[0].where in case.lines, report


@pytest.mark.parametrize("name", CASES)
def test_structure_names_the_line(name):
    case = CASES[name]
    report = check(case, None)
    assert report.kind == case.structure, report
    if case.lines and case.structure not in (None, "factor"):
        assert report.findings[0].where in case.lines, report


@pytest.mark.slow
@pytest.mark.parametrize(("how", "name"), MUTATIONS)
def test_one_more_mistake_is_found(how, name):
    case = losses.mutate(CASES[name], how)
    assert case is not None
    report = check(case, N)
    assert report.kind == case.kind, report


def test_both_remedies_for_terms_with_counts_of_their_own_are_exact():
    """Dividing both by one count would be another loss."""
    assert "`optaccum.microbatched`" in (check(CASES["tokens_and_rows"], N).remedy or "")

    def sums(p, b):
        each = losses.cross_entropy(p, b) * b["mask"]
        return {"loss": each.sum(1), "tokens": b["mask"].sum(1), "square": losses.scores(p, b) ** 2}

    def loss_fn(p):
        out = microbatched(sums, num_microbatches=N)(p, BATCH)
        return out["loss"].sum() / out["tokens"].sum() + 0.5 * jnp.mean(out["square"])

    apart = (
        (losses.token_mean, lambda p, b: b["mask"].sum()),
        (lambda p, b: 0.5 * jnp.mean(losses.scores(p, b) ** 2), None),
    )
    terms = [
        jax.jit(value_and_grad(fun, num_microbatches=N, weight_fn=weight_fn))(PARAMS, BATCH)
        for fun, weight_fn in apart
    ]
    expected = jax.jit(jax.value_and_grad(losses.tokens_and_rows))(PARAMS, BATCH)
    for found in (jax.jit(jax.value_and_grad(loss_fn))(PARAMS), jax.tree.map(jnp.add, *terms)):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), found, expected
        )


def mean(params, x):
    return jnp.mean((x @ params) ** 2)


def remedy_of(report):
    """Returns what a report advises, as `reported.Case` has it."""
    said = report.remedy or ""
    marks = {
        "no accumulation": "statistics",
        "before the batch is cut": "hoisted",
        "`optaccum.microbatched`": "microbatched",
        "sum against mean": "factor",
    }
    found = [name for mark, name in marks.items() if mark in said]
    # As in `weight_fn=lambda p, b: b["mask"].sum()`.
    return found[0] if found else said.split("`")[1].partition(": ")[2]


def follow(case, remedy, report, batch):
    """Returns the gradient of a program that does what a report advises."""
    first, last = case.parts
    n = reported.ROWS // 2
    if remedy == "microbatched":
        model = microbatched(first, num_microbatches=n)
        return jax.grad(lambda p: last(model(p, batch), batch))(reported.PARAMS)
    if remedy == "hoisted":
        return value_and_grad(last, num_microbatches=n)(reported.PARAMS, first(batch))[1]
    scale = report.scale if remedy == "factor" else 1.0
    counted = None if remedy == "factor" else lambda p, b: eval(remedy, {"jnp": jnp, "b": b})
    gradient = value_and_grad(case.fun, num_microbatches=n, weight_fn=counted)
    return jax.tree.map(lambda g: scale * g, gradient(reported.PARAMS, batch)[1])


# The report has tried each of them. The first of a kind is followed by hand, too.
FOLLOWED = {case.remedy: name for name, case in reversed(reported.CASES.items())}


@pytest.mark.slow
@pytest.mark.parametrize("name", reported.CASES)
def test_a_remedy_works_when_it_is_followed(name):
    case, batch = reported.CASES[name], reported.make_batch(0)
    report = check_loss(case.fun, reported.PARAMS, batch, num_microbatches=reported.ROWS // 2)
    assert report.kind == case.kind, report
    if case.kind is None:
        assert report.exact is True
        return
    remedy = remedy_of(report)
    assert remedy == case.remedy, report
    if remedy == "statistics":
        assert report.left is None  # there is nothing to try
        return
    assert report.left is not None
    assert report.left < 1e-5
    if FOLLOWED[remedy] != name:
        return
    expected = jax.grad(case.fun)(reported.PARAMS, batch)
    for a, e in zip(
        *map(jax.tree.leaves, (follow(case, remedy, report, batch), expected)), strict=True
    ):
        # Some hundred roundings of terms ten times as large as their sum.
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("store", [True, False], ids=["stored", "computed"])
@pytest.mark.parametrize("name", ["cox", "hard_examples", "batch_norm"])
def test_what_is_clear_in_float32_is_clear_in_bfloat16(name, store):
    def narrow(tree):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, tree)

    case = reported.CASES[name]
    args = reported.PARAMS, reported.make_batch(0)
    report = (
        check_loss(case.fun, *narrow(args), num_microbatches=4)
        if store
        else check_loss(lambda p, b: case.fun(narrow(p), narrow(b)), *args, num_microbatches=4)
    )
    assert (report.exact, report.kind) == (False, case.kind), report


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_rows_is_exact_by_chance(seed):
    """In half of these batches each microbatch has as many of the hardest rows."""
    case = reported.CASES["hard_examples"]
    with pytest.raises(AssertionError, match="Not exact"):
        assert_equivalent(case.fun, reported.PARAMS, reported.make_batch(seed), num_microbatches=2)


def test_what_is_hoisted_may_leave_a_sum():
    """Followed by hand: advantages and the number of tokens are those of the whole batch."""

    def loss(p, b):
        each = jnp.exp(0.1 * reported.token_losses(p, b)) * b["advantage"][:, None]
        return -jnp.sum(each * b["mask"]) / b["tokens"][0]

    def prepared(b):
        advantage = (b["reward"] - b["reward"].mean()) / b["reward"].std()
        return {**b, "advantage": advantage, "tokens": jnp.full(len(advantage), b["mask"].sum())}

    batch = reported.make_batch(0)
    whole = lambda p, b: loss(p, prepared(b))  # noqa: E731
    report = check_loss(whole, reported.PARAMS, batch, num_microbatches=4)
    assert "before the batch is cut" in str(report.remedy)
    assert "`use_grad_mean=False`" in str(report.remedy)
    gradient = value_and_grad(loss, num_microbatches=4)(reported.PARAMS, prepared(batch))[1]
    expected = jax.grad(whole)(reported.PARAMS, batch)
    for a, e in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(4 * a, e, rtol=1e-4, atol=1e-5)


def test_structure_names_what_helps():
    for name, part in {
        "batch_norm": "no accumulation changes it",
        "whitened_rewards": "before the batch is cut",
        "sigmoid_pairs": "`optaccum.microbatched`",
    }.items():
        report = check_loss(reported.CASES[name].fun, reported.PARAMS, reported.make_batch(0))
        assert part in str(report.remedy), report


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


def taken_apart(part):
    """Returns a loss of one number for each row, of which `part` makes the loss."""
    return lambda w, batch: part(jnp.tanh(batch["x"] @ w), batch["group"])


@pytest.mark.parametrize(
    ("part", "kinds"),
    [
        (lambda z, group: ((jnp.tril(jnp.ones((len(z), len(z)))) @ z) ** 2).mean(), {"pairwise"}),
        (lambda z, group: jnp.std(z.reshape(-1, 2), axis=1).mean(), {"order"}),
        (lambda z, group: (jax.ops.segment_sum(z, group, 3) ** 2).mean(), {"nonlinear"}),
        (lambda z, group: (z**2).sum() * (1 / group.sum()), {"divisor"}),
        (lambda z, group: (z * group.mean()).mean(), {"nonlinear"}),
        (lambda z, group: (z**2).sum() * group.max() / len(z), {"nonlinear"}),
        (lambda z, group: jax.vmap(lambda x: jnp.linalg.det(jnp.eye(2) + x))(z).mean(), set()),
        (lambda z, group: jax.lax.while_loop(lambda x: x[0] < 2, jnp.exp, z).mean(), {"unknown"}),
        (lambda z, group: z.mean() + jnp.arange(len(z)).max(), set()),
    ],
    ids=[
        "smoothed",
        "grouped",
        "segments",
        "inverse",
        "scaled",
        "maximum",
        "matrices",
        "loop",
        "positions",
    ],
)
def test_structure_follows_operations_on_rows(part, kinds):
    batch = {"x": X, "group": jnp.array([0, 1, 2, 1, 0, 2, 2, 1])}
    report = check_loss(taken_apart(part), W, batch)
    assert {finding.kind for finding in report.findings} == kinds, report


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
    assert report.exact is True, report
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
        (uneven_loss(jnp.bfloat16), False),
    ],
    ids=["float32", "bfloat16 beside it", "bfloat16"],
)
def test_low_precision_hides_no_mistake(loss, exact):
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


@pytest.mark.slow
@pytest.mark.parametrize("option", [{}, {"scanned": True}], ids=str)
def test_the_models_of_the_benchmarks_have_no_finding(option):
    model = dataclasses.replace(transformer.PRESETS["100k"], vocabulary=32, width=16, **option)
    params = transformer.make_params(model)
    (batch,) = transformer.make_window(model, 1, 8, 12, ragged=True)
    given = {"num_microbatches": 4, "weight_fn": model.tokens_of}
    report = check_loss(model.mean_loss, *jax.tree.map(jnp.asarray, (params, batch)), **given)
    assert report.exact is True, report
    assert report.findings == ()


@pytest.mark.parametrize("n", [None, 2])
def test_a_loss_that_closes_over_its_batch_is_refused(n):
    x = jnp.arange(8.0).reshape(4, 2)
    with pytest.raises(ValueError, match="does not read the values of its batch"):
        check_loss(lambda p, batch: jnp.mean((x @ p) ** 2), jnp.ones(2), x, num_microbatches=n)


def test_weights_may_add_up_to_less_than_one():
    def loss(w, batch):
        return jnp.sum(batch["w"] * (batch["x"] @ w) ** 2) / jnp.sum(batch["w"])

    batch = {"x": X[:4], "w": jnp.array([1e-3, 2e-3, 3e-3, 5e-3])}
    report = check_loss(loss, W, batch, num_microbatches=2)
    assert report.kind == "weights"
    assert "batch['w'].sum()" in str(report.remedy)
