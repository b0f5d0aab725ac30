"""`check_loss` says of losses from public bugs and papers whether they accumulate, and why not."""

from helpers import losses
from helpers.losses import BATCH, CASES, PARAMS, N
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaccum import microbatched, value_and_grad
from optaccum.testing import check_loss

# Every loss that is right, and the first one of each kind of mistake, which it is to keep.
FIRST = {(case.kind, case.structure): name for name, case in reversed(CASES.items())}
MUTATIONS = [
    pytest.param(how, name, id=f"{how}-{name}")
    for how in ("weight", "factor", "coupled")
    for name, case in CASES.items()
    if case.kind is None or FIRST[case.kind, case.structure] == name
    if losses.mutate(case, how) is not None
]


def check(case, num_microbatches):
    options = dict(case.options)
    batch = options.pop("batch", losses.BATCH)
    return check_loss(case.fun, losses.PARAMS, batch, num_microbatches=num_microbatches, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
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
        value_and_grad(fun, num_microbatches=N, weight_fn=weight_fn)(PARAMS, BATCH)
        for fun, weight_fn in apart
    ]
    expected = jax.value_and_grad(losses.tokens_and_rows)(PARAMS, BATCH)
    for found in (jax.value_and_grad(loss_fn)(PARAMS), jax.tree.map(jnp.add, *terms)):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), found, expected
        )
