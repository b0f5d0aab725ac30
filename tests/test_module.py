"""What `import optaccum`, `dir` and `help` show, and what type checkers know."""

# pyright: reportUnnecessaryTypeIgnoreComment=true, reportArgumentType=true, reportCallIssue=true

import inspect
import pathlib
import pydoc
import re
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, assert_type

import jax
import jax.numpy as jnp
import optax
import pytest

import optaccum

ROOT = pathlib.Path(__file__).parent.parent
MODULES = [optaccum, optaccum.flax, optaccum.testing]
PUBLIC = [getattr(module, name) for module in MODULES for name in module.__all__]


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")


def test_dir_has_public_names_only():
    names = {name for name in dir(optaccum) if not name.startswith("__")}
    assert names == {*optaccum.__all__, "flax", "testing"}


def test_submodules_are_imported_when_they_are_used():
    program = (
        "import sys, optaccum\n"
        "print([m for m in sys.modules if m in ('flax', 'optaccum.testing')])\n"
        "print(optaccum.testing.check_loss.__name__, optaccum.flax.TrainState.__name__)\n"
    )
    assert run(program).stdout == "[]\ncheck_loss TrainState\n"


def test_without_flax_help_works_and_the_attribute_says_what_to_install():
    program = (
        "import sys; sys.modules['flax'] = None\n"
        "import optaccum, pydoc; pydoc.render_doc(optaccum); print(hasattr(optaccum, 'flax'))\n"
        "optaccum.flax\n"
    )
    done = run(program)
    assert done.stdout == "False\n"
    assert "AttributeError: optaccum.flax needs Flax" in done.stderr
    assert "pip install 'optaccum[flax]'" in done.stderr


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="module 'optaccum' has no attribute 'nope'"):
        getattr(optaccum, "nope")  # noqa: B009  (type checkers know it, too)


def test_help_begins_with_a_program_that_runs():
    text = pydoc.plain(pydoc.render_doc(optaccum))
    program = re.search(r"::\n\s*\n((?:        .*\n|\s*\n)+)", text)
    assert program is not None
    assert text.index(program[0]) < 250
    names = {
        "jax": jax,
        "optax": optax,
        "params": jnp.ones(2),
        "microbatches": jnp.ones((5, 3, 2)),
        "loss_fn": lambda params, batch: jnp.mean((batch @ params) ** 2),
    }
    exec(textwrap.dedent(program[1]), names)
    assert int(names["opt_state"].gradient_step) == 1


@pytest.mark.parametrize("thing", [*MODULES, *PUBLIC], ids=lambda thing: thing.__name__)
def test_every_pointer_of_a_docstring_leads_somewhere(thing):
    text = inspect.getdoc(thing) or ""
    for page in re.findall(r"docs/[\w/.]+", text):
        assert (ROOT / page.rstrip(".")).is_file(), page
    for name in re.findall(r"(?:help\(|:(?:func|class|meth):`~?)(optaccum[\w.]*)", text):
        found = optaccum
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    for name in re.findall(r":(?:func|class):`(\w+)`", text):
        assert any(hasattr(module, name) for module in MODULES), name
    assert "Documentation:" not in text


def test_type_checkers_know_states_losses_and_gradients():
    """The assertions are for pyright; here they only run."""

    def loss_fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.mean((x @ params["w"]) ** 2)

    def with_aux(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, str]:
        return loss_fn(params, x), "none"

    params, x = {"w": jnp.ones(2)}, jnp.ones((4, 2))
    tx = optaccum.accumulate(2, optax.sgd(0.1))
    state = assert_type(tx.init(params), optaccum.AccumulateState)
    _, state = tx.update(params, state, params, weight=2)
    assert_type(state, optaccum.AccumulateState)
    new, state = optaccum.apply_gradients(tx, params, state, params)
    assert_type((new, state), tuple[dict[str, jax.Array], optaccum.AccumulateState])
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    loss, grads = optaccum.value_and_grad(loss_fn, num_microbatches=2)(params, x)
    assert_type((loss, grads), tuple[jax.Array, dict[str, jax.Array]])
    loss, _ = optaccum.value_and_grad(loss_fn, (0,), num_microbatches=2)(params, x)
    assert_type(loss, jax.Array)
    if TYPE_CHECKING:
        step = optaccum.value_and_grad(with_aux, has_aux=True, num_microbatches=2)
        assert_type(step(params, x), tuple[tuple[jax.Array, str], dict[str, jax.Array]])
        optaccum.accumulate(2, loss_reduction="median")  # pyright: ignore[reportArgumentType]
