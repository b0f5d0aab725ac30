"""The code of README and docs runs, the commands can be pasted, and the files are there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_examples_run_as_they_say(capsys):
    """One after the other, as somebody would who pastes them into one session."""
    first, *others = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(compile(first, "README.md", "exec"), names)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [[str(i), str(i in (3, 7))] for i in range(8)]
    for code in others:
        exec(compile(code, "train.py", "exec"), names)
    assert capsys.readouterr().out.endswith(re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)[0])
    assert (int(names["state"].mini_step), int(names["optimizer"].mini_step)) == (1, 1)
    assert float(optaccum.get_state(names["state"].opt_state).weight) == 32


def test_each_bug_is_found_as_the_page_says(capsys):
    text = (ROOT / "docs" / "is_my_accumulation_right.md").read_text()
    names, programs = {}, re.findall(r"```(python|text)\n(.*?)```", text, re.DOTALL)
    for language, block in programs:
        if language == "python":
            exec(compile(block, "train.py", "exec"), names)
        else:
            assert capsys.readouterr().out == block
    assert [language for language, _ in programs].count("text") == 4


@pytest.mark.skipif(not hasattr(jax, "reshard"), reason="needs a newer JAX")
def test_many_devices_give_what_one_gives():
    text = (ROOT / "docs" / "many_devices.md").read_text()
    names, trained = {}, []
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "many_devices.md", "exec"), names)
        trained.append(names.pop("new_params", None))
    params, batch = names["params"], (names["x"], names["mask"])
    loss, grads = jax.value_and_grad(names["loss_fn"])(params, *batch)
    opt = optax.adamw(1e-2)
    expected = optax.apply_updates(params, opt.update(grads, opt.init(params), params)[0])
    found = [*filter(None, trained)]
    assert len(found) == 2

    def assert_close(a, e):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-8)

    for actual in found:
        jax.tree.map(assert_close, actual, expected)
    jax.tree.map(assert_close, (names["loss"], names["grads"]), (loss, grads))


def test_coupled_losses_give_what_the_full_batch_gives():
    text = (ROOT / "docs" / "coupled_losses.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "coupled_losses.md", "exec"), names)
    params, batch, encode = (names[name] for name in ("params", "batch", "encode"))
    expected = jax.value_and_grad(lambda params: names["info_nce"](encode(params, batch)))(params)

    def balance(params):
        gate, loads = names["route"](params, batch["image"])
        return 8 * jnp.sum(loads[0] / len(gate) * gate.mean(axis=0))

    def assert_close(a, e):
        # Sums over 64 rows and 8 features, in another order.
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)

    for way in ("", "tiled_", "sharded_"):
        jax.tree.map(assert_close, (names[f"{way}loss"], names[f"{way}grads"]), expected)
    found = names["balance_loss"], names["balance_grads"]
    jax.tree.map(assert_close, found, jax.value_and_grad(balance)(params))


def test_each_command_sets_up_all_that_it_needs():
    commands = re.findall(r"```sh\n(.*)\n```", TEXT)
    examples = (f"examples/{name}.py" for name in ("digits", "lm", "multihost", "clip"))
    programs = *examples, "-m pytest -q -n 2"
    for command, program in zip(commands, programs, strict=True):
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(program)


def test_every_file_that_they_name_exists():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    for page in pages:
        for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", page.read_text()):
            assert pathlib.Path(page.parent, name).exists(), (page, name)
