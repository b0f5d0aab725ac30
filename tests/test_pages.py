"""The pages of the site: their programs print what stands below them, and no name is left out."""

import doctest
import pathlib
import re

import pytest

import optaccum
import optaccum.flax
import optaccum.testing

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
OTHERS = ("many_devices", "switching", "coupled_losses", "is_my_accumulation_right", "errors")
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
