"""The pages: a README that a newcomer reads to its end, and links that lead somewhere."""

from pathlib import Path

import pytest

from mcmoe_vllm.model.architectures import TESTED
from tests import lint_pages
from tests.lint_pages import MAX_README_WORDS, ROOT

README = (ROOT / "README.md").read_text()
in_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")


def test_pages_say_which_families_were_tested() -> None:
    """As TESTED does, no more and no less; the README counts those beside the four it names."""
    page = (ROOT / "docs" / "models.md").read_text()
    rows = [f"| {row.family} | {name} | {row.level} |" for name, row in TESTED.items()]
    table = page.partition("| family | class | tested |\n|---|---|---|\n")[2]
    assert table.partition("\n\n")[0].splitlines() == rows
    assert f"OLMoE; {len(TESTED) - 4} families more as small random models" in README


def test_readme_is_short() -> None:
    assert not lint_pages.problems(README)


@in_git
def test_every_link_resolves() -> None:
    files = lint_pages.tracked_files()
    assert ROOT / "README.md" in files
    assert not lint_pages.broken_links(files)


def test_readme_names_the_two_commands() -> None:
    """One compresses a model and serves it, one passes the tests."""
    code = "".join(found.group() for found in lint_pages.FENCE.finditer(README))
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines()}
    for target in ("demo", "test"):
        assert f"\nmake {target} " in code
        assert target in targets


@pytest.mark.parametrize(
    "more",
    [
        "word " * MAX_README_WORDS,  # too long, in sentences of any length
        "\n\n" + "This sentence has nine words and then a comma, and goes on " * 30 + ".",
    ],
)
def test_a_long_readme_is_refused(more: str) -> None:
    assert lint_pages.problems(README + more)


@pytest.mark.parametrize(
    ("page", "lengths"),
    [
        ("One two. Three four five.", [2, 3]),
        ("At 2.5 bits it is v0.26.0 of vLLM. Next.", [8, 1]),  # full stops inside a number
        ("It ends here (see [a page](docs/a.md)). And\nhere.", [6, 2]),  # a link's address
        ("Run `mcmoe quantize MODEL -o OUT` now.", [3]),  # code is one word
        ("* one two\n* three\n  four five", [2, 3]),  # list items are apart, lines are not
        ("Before a table:\n\n| a | b |\n|---|---|\n| c d e | f |", [3]),
        ("# A heading\n\n![a picture](x.png)\n\n*Its caption. All of it.*\n\nText.", [1]),
        ("---\nfront: matter\n---\n\nOne.\n\n```\ncode. Code.\n```\n\n    indented code", [1]),
        ("**Bold first.** Then plain - all of it.", [2, 5]),  # neither is a list's mark
    ],
)
def test_sentences(page: str, lengths: list[int]) -> None:
    assert [lint_pages.words(found) for found in lint_pages.sentences(page)] == lengths


def test_words_are_counted_as_wc_does() -> None:
    assert lint_pages.words_outside_code("a | b\n```\nc\n```\n![d](e) f") == 5


@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("[a](docs/a.md)", False),
        ("[a folder](docs/)", False),
        ("[a heading](docs/a.md#two-words-of-code)", False),
        ("[here](#top)", False),
        ("[elsewhere](https://example.org/a)", False),
        ("`[code](nowhere.md)`", False),
        ("```\n[code](nowhere.md)\n```", False),
        ("[a](docs/b.md)", True),
        ("![a picture](docs/a.png)", True),
        ('<img src="docs/a.png">', True),
        ("[a]: docs/b.md", True),
        ("[no heading](docs/a.md#three)", True),
        ("[not here](#bottom)", True),
        ("[not in git](ignored.md)", True),
        ("[above the clone](../..)", True),
        ("[![a picture in a link](docs/a.png)](docs/a.md)", True),
    ],
)
def test_links(link: str, broken: bool, tmp_path: Path) -> None:
    pages = {"README.md": f"# Top\n\n{link}\n", "docs/a.md": "## Two words of `code`\n"}
    for name, text in (pages | {"ignored.md": ""}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = lint_pages.broken_links({tmp_path / name for name in pages}, tmp_path)
    assert len(found) == broken
