"""The longer pages compute what they say, the commands can be pasted, and the files are there."""

import pathlib
import re

import jax
import numpy as np
import optax
import pytest

import optaccum

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


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
    assert len(found) == 3

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

    def assert_close(a, e):
        # Sums over 64 rows and 8 features, in another order.
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)

    for way in ("", "tiled_", "sharded_"):
        jax.tree.map(assert_close, (names[f"{way}loss"], names[f"{way}grads"]), expected)


def test_a_mixture_of_experts_is_balanced_over_the_whole_batch_as_the_page_says():
    text = (ROOT / "docs" / "coupled_losses.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "experts" in code or code.startswith("import"):
            exec(compile(code, "coupled_losses.md", "exec"), names)
    params, batch = names["moe_params"], names["text"]

    def loss_fn(params, batch):
        return names["moe_loss"](names["experts"](params, batch))

    def balance(params, batch):
        out = names["experts"](params, batch)
        return names["moe_loss"](out) - out["losses"].sum() / out["tokens"].sum()

    def off(actual, expected):
        actual, expected = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
            for tree in (actual, expected)
        )
        return np.linalg.norm(actual - expected) / np.linalg.norm(expected)

    def accumulated(fun):
        tokens = {"weight_fn": lambda params, batch: batch["real"].sum()}
        step = optaccum.value_and_grad(fun, num_microbatches=16, **tokens)
        return off(jax.jit(step)(params, batch)[1], jax.grad(fun)(params, batch))

    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    np.testing.assert_allclose(names["moe_value"], value, rtol=1e-5)
    assert off(names["moe_grads"], grads) < 2e-6  # "4e-7", of which rounding decides
    assert f"{accumulated(balance):.2f}" == "0.22"
    assert f"{accumulated(loss_fn):.0e}" == "2e-04"


def test_each_command_sets_up_all_that_it_needs():
    text = TEXT + (ROOT / "docs" / "install.md").read_text()
    commands = re.findall(r"(?m)^python3 -m venv .* && .*$", text)
    examples = [f"examples/{name}.py" for name in ("digits", "lm", "multihost", "clip")]
    programs = [examples[0], "-m pytest -q -n 2", *examples]
    for command, program in zip(commands, programs, strict=True):
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(program)


def test_every_file_that_they_name_exists():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", page.read_text()):
            assert pathlib.Path(page.parent, name).exists(), (page, name)


def test_one_version_and_its_date_are_everywhere():
    released = re.search(r"## (\S+) \((\S+)\)", (ROOT / "CHANGELOG.md").read_text())
    assert released is not None
    version, date = released.groups()
    citation = (ROOT / "CITATION.cff").read_text()
    assert version == optaccum.__version__
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation


def test_the_readme_fits_on_a_page():
    assert len(TEXT.split()) <= 700
