"""What `optaccum.testing` promises of both checks: reports, errors, and what an import costs."""

import subprocess
import sys

from helpers.losses import BATCH, CASES, PARAMS
import jax
import jax.numpy as jnp
import pytest

from optaccum.testing import assert_equivalent, check_loss, check_step

X, W = jax.random.normal(jax.random.key(0), (8, 3)), jnp.array([1.0, -2.0, 0.5])


def mean(params, x):
    return jnp.mean((x @ params) ** 2)


def test_importing_the_package_does_not_import_it():
    program = "import sys, optaccum; print([m for m in sys.modules if 'testing' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert "optaccum" not in done.stdout, done.stderr
    assert done.returncode == 0


def test_a_report_is_a_paragraph_with_the_leaf_the_line_and_the_remedy():
    case = CASES["token_mean"]
    text = str(check_loss(case.fun, PARAMS, BATCH, num_microbatches=4))
    for part in ("Not exact", "b['mask']", *case.lines, "`weight=`", "`weight_fn=lambda "):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


def test_assert_equivalent_raises_the_text_of_the_report():
    assert_equivalent(mean, W, X, num_microbatches=4)
    with pytest.raises(AssertionError, match="sum against mean"):
        assert_equivalent(lambda w, x: jnp.sum((x @ w) ** 2), W, X, num_microbatches=4)


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
