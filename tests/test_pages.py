"""The pages of the site compute what they say, and no name, file or command is left out."""

import doctest
import json
import pathlib
import re

import equinox as eqx
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optaccum
import optaccum.flax
import optaccum.testing

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
OTHERS = "many_devices", "old_checkpoints", "coupled_losses", "is_my_accumulation_right", "errors"
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted([*DOCS.glob("*.md"), *DOCS.glob("how_to/*.md")])]
    if page.stem not in OTHERS  # they have tests of their own
    and not page.read_text().startswith("---")  # a notebook, which the build runs
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page):
    return re.findall(r"```(python|py|text)\n(.*?)```", page.read_text(), re.DOTALL)


def assert_said(expected, actual):
    assert doctest.OutputChecker().check_output(expected, actual, FLAGS), actual


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_programs_print_what_the_page_says(page, capsys):
    names = {}
    for language, block in blocks(page):
        if language == "python":
            exec(compile(block, "train.py", "exec"), names)
        elif language == "text":
            assert_said(block, capsys.readouterr().out)


def test_mistakes_say_what_the_page_says():
    names, said = {}, None
    for language, block in blocks(DOCS / "errors.md"):
        if language == "python":
            exec(compile(block, "train.py", "exec"), names)
        elif language == "py":
            assert said is None
            with pytest.raises(Exception, match=r"\w") as error:  # a warning is an error here
                exec(compile(block, "train.py", "exec"), dict(names))
            said = f"{error.type.__name__}: {error.value}\n"
        else:
            assert_said(block, said)
            said = None


@pytest.mark.parametrize("module", [optaccum, optaccum.flax, optaccum.testing])
def test_the_reference_has_every_public_name(module):
    pages = "\n".join(page.read_text() for page in DOCS.glob("api/*.md"))
    sections = re.split(r"\.\. (?:currentmodule|automodule):: ", pages)
    of_module = [text for text in sections if text.split("\n")[0].strip() == module.__name__]
    found = re.findall(r"\.\. auto(?:function|class):: (\w+)", "\n".join(of_module))
    assert sorted(found) == sorted(module.__all__)


# The longer pages.

TEXT = (ROOT / "README.md").read_text()


def test_each_bug_is_found_as_the_page_says(capsys):
    text = (ROOT / "docs" / "is_my_accumulation_right.md").read_text()
    names, programs = {}, re.findall(r"```(python|text)\n(.*?)```", text, re.DOTALL)
    for language, block in programs:
        if language == "python":
            exec(compile(block, "train.py", "exec"), names)
        else:
            assert capsys.readouterr().out == block
    assert [language for language, _ in programs].count("text") == 5


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
    assert len(found) == 5

    def assert_close(a, e):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-8)

    for actual in found:
        jax.tree.map(assert_close, actual, expected)
    jax.tree.map(assert_close, (names["loss"], names["grads"]), (loss, grads))


@pytest.fixture(scope="module")
def coupled():
    text = (ROOT / "docs" / "coupled_losses.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "coupled_losses.md", "exec"), names)
    return names


def test_coupled_losses_give_what_the_full_batch_gives(coupled):
    params, batch, encode = (coupled[name] for name in ("params", "batch", "encode"))
    expected = jax.value_and_grad(lambda p: coupled["info_nce"](encode(p, batch)))(params)

    def assert_close(a, e):
        # Sums over 64 rows and 8 features, in another order.
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)

    for way in ("", "tiled_", "sharded_"):
        jax.tree.map(assert_close, (coupled[f"{way}loss"], coupled[f"{way}grads"]), expected)


def test_a_mixture_of_experts_is_balanced_over_the_whole_batch_as_the_page_says(coupled):
    params, batch, experts = (coupled[name] for name in ("moe_params", "text", "experts"))

    def loss_fn(params, batch):
        return coupled["moe_loss"](experts(params, batch))

    def balance(params, batch):
        out = experts(params, batch)
        return coupled["moe_loss"](out) - out["losses"].sum() / out["tokens"].sum()

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
    np.testing.assert_allclose(coupled["moe_value"], value, rtol=1e-5)
    assert off(coupled["moe_grads"], grads) < 2e-6  # "4e-7", of which rounding decides
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


def anchors(page):
    """Returns the anchors that GitHub gives to the headings of a page, and of one it includes."""
    text = page.read_text()
    for included in re.findall(r"```\{include\} (\S+)", text):
        text += (page.parent / included).read_text()
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


def test_every_link_to_a_file_or_a_heading_has_its_target():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"]
    for page in pages:
        for name, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]*))?\)", page.read_text()):
            target = pathlib.Path(page.parent, name) if name else page
            assert target.exists(), (page, name)
            assert not anchor or anchor in anchors(target), (page, name, anchor)


def test_pages_that_the_readme_links_have_no_markup_that_github_shows_as_code():
    for name in re.findall(r"\]\((docs/[\w./-]+\.md)", TEXT):
        assert not re.search(r"(?m)^:::|^```\{(?!code-cell)", (ROOT / name).read_text()), name


def test_actions_are_pinned_by_hash_and_have_no_rights_but_to_read():
    for workflow in (ROOT / ".github" / "workflows").iterdir():
        text = workflow.read_text()
        for action in re.findall(r"uses: (.*)", text):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action), (workflow, action)
        assert "\npermissions:\n  contents: read\n" in text


def test_one_version_and_its_date_are_everywhere():
    released = re.search(r"## (\S+) \((\S+)\)", (ROOT / "CHANGELOG.md").read_text())
    assert released is not None
    version, date = released.groups()
    citation = (ROOT / "CITATION.cff").read_text()
    assert version == optaccum.__version__
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation


PROGRAMS = [block for language, block in blocks(ROOT / "README.md") if language == "python"]


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program_of_the_readme_runs_when_it_is_copied_alone(program):
    exec(compile(program, "train.py", "exec"), {})


def test_the_readme_has_the_numbers_of_the_committed_run():
    run = json.loads((ROOT / "benchmarks" / "results" / "headline.json").read_text())["memory"]
    whole, ours = (run["peak_bytes"][x] for x in ("full batch", "optaccum.apply_gradients"))
    saved, parameters = 100 * (1 - ours / whole), run["parameters"] / 1e6
    for page in (TEXT, (DOCS / "index.md").read_text()):
        assert f"{whole / 1e9:.0f} GB with the full batch and {ours / 1e9:.0f} GB in" in page
    assert f"**{saved:.0f}% less memory** than the full batch: AdamW, {parameters:.0f} m" in TEXT


def test_the_readme_fits_on_a_page():
    assert len(TEXT.split()) <= 700


# Old checkpoints, and what they say in a new program; Equinox and nnx.


def run(name):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL):
        exec(compile(code, name, "exec"), names)
    return names


OLD_CHECKPOINTS = (DOCS / "how_to" / "old_checkpoints.md").read_text()


@pytest.fixture(scope="module")
def switched():
    return run("how_to/old_checkpoints.md")


def test_the_converted_state_is_there_and_back(switched):
    state = optaccum.get_state(switched["opt_state"])
    assert isinstance(state, optaccum.AccumulateState)
    assert optax.tree.get(switched["back"], "acc_grads")["w"].shape == (3,)


def test_the_restored_state_lies_where_the_parameters_lie(switched):
    restored = switched["restored"]
    assert restored.grad_sum["w"].sharding.spec == jax.P("data")
    assert len(restored.mini_step.sharding.device_set) == jax.device_count()
    assert int(restored.mini_step) == 1


def test_equinox_trains_as_the_full_batch_does():
    switched = run("how_to/equinox.md")
    assert int(optaccum.get_state(switched["opt_state"]).gradient_step) == 1
    mse, x, y = (switched[name] for name in ("mse", "x", "y"))
    loss, grads = eqx.filter_value_and_grad(mse)(switched["model"], x, y)
    np.testing.assert_allclose(switched["eqx_loss"], loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(switched["eqx_grads"]), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_nnx_carries_its_statistics():
    switched = run("how_to/flax.md")
    assert np.isfinite(switched["nnx_value"])
    assert float(jnp.abs(switched["nnx_model"].norm.mean[...]).sum()) > 0


# An old checkpoint in a new program: the messages that the page quotes.

PARAMS = {"w": jnp.ones(2)}
OLD = optax.MultiSteps(optax.adam(0.1), 4)
TX = optaccum.accumulate(4, optax.adam(0.1))


def _sorted_names(text):
    """Returns a message with the names in braces sorted: sets have no order."""
    return re.sub(r"\{(.*?)\}", lambda m: str(sorted(m[1].split(", "))), text)


def test_flax_says_what_the_page_quotes():
    template, state = TX.init(PARAMS), OLD.init(PARAMS)
    quoted = next(
        line for line in OLD_CHECKPOINTS.splitlines() if line.startswith("ValueError: The field")
    )
    for restore in (
        lambda: serialization.from_bytes(template, serialization.to_bytes(state)),
        lambda: serialization.from_state_dict(template, serialization.to_state_dict(state)),
    ):
        with pytest.raises(ValueError, match="field names") as error:
            restore()
        assert _sorted_names(f"ValueError: {error.value}") == _sorted_names(quoted)


def test_a_dict_says_what_the_page_quotes():
    data = serialization.msgpack_serialize(serialization.to_state_dict(OLD.init(PARAMS)))
    restored = serialization.msgpack_restore(data)
    with pytest.raises(TypeError) as error:
        TX.update(PARAMS, restored, PARAMS)
    assert f"TypeError: {error.value}" in OLD_CHECKPOINTS
    old = serialization.from_state_dict(OLD.init(PARAMS), restored)
    assert optaccum.from_multi_steps(TX, old, PARAMS).mini_step == 0


def test_orbax_says_what_the_page_quotes(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", OLD.init(PARAMS))
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="do not match") as error:
            checkpointer.restore(tmp_path / "old", TX.init(PARAMS))
        first, second, third, *_, last = str(error.value).strip().splitlines()
        quoted = "\n".join([f"ValueError: {first}", second, third, "...", last])
        assert quoted in OLD_CHECKPOINTS
        old = checkpointer.restore(tmp_path / "old", OLD.init(PARAMS))
    assert optaccum.from_multi_steps(TX, old, PARAMS).mini_step == 0


def test_a_template_on_one_device_says_what_the_page_quotes(switched):
    params = jax.device_put(PARAMS, jax.NamedSharding(switched["mesh"], jax.P()))
    one = jax.device_put(TX.init(PARAMS), jax.devices()[0])
    with pytest.raises(ValueError, match="incompatible devices for jitted") as error:
        jax.jit(lambda s, p: TX.update(p, s, p))(one, params)
    assert f"ValueError: {str(error.value).split('. Got')[0]}" in OLD_CHECKPOINTS
