"""What a machine can check of the pages: length, length of sentences, links.

    python tests/lint_pages.py        a line for every page, then what is wrong

A sentence is a run of prose that ends at `.`, `!`, `?` or, before a table or code, at `:`. Tables,
code, headings, pictures and captions (a paragraph in italics) hold none. A span of code is a word.
"""

import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
MAX_README_WORDS = 700
MAX_MEAN_SENTENCE = 18
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)
FRONT_MATTER = re.compile(r"\A---\n.*?^---$", re.DOTALL | re.MULTILINE)
CODE_SPAN = re.compile(r"(`+)(?:(?!\n\s*\n).)+?\1", re.DOTALL)
LINK = re.compile(
    r"""\]\(\s*<?([^)\s>]+)[^)]*\) | \b(?:src|href)="([^"]+)" | ^\[[^\]]+\]:[ ]*(\S+)""",
    re.MULTILINE | re.VERBOSE,
)
ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?])[)*_\"']*\s+(?=[\"'(*_`\[]*[A-Z0-9`])|:\s*$")


def prose(page: str) -> list[str]:
    """The paragraphs and list items of a page, each on one line."""
    page = FENCE.sub("\n", FRONT_MATTER.sub("", page))
    found = []
    for block in re.split(r"\n\s*\n", page):
        items: list[list[str]] = []
        for line in block.strip("\n").splitlines():
            if re.match(r"\s*(\||#|<|---)", line) or line.startswith("    "):
                continue  # a table's row, a heading, HTML, indented code
            if ITEM.match(line) or not items:
                items.append([])
            items[-1].append(ITEM.sub("", line, count=1).strip())
        found += [" ".join(lines) for lines in items]
    return [text for text in found if text and not is_caption(text)]


def is_caption(paragraph: str) -> bool:
    """A picture, or a paragraph in italics below one or below a table."""
    return paragraph.startswith("![") or bool(re.fullmatch(r"([*_])(?![*_\s]).+\1", paragraph))


def sentences(page: str) -> list[str]:
    return [
        sentence
        for paragraph in prose(page)
        for sentence in SENTENCE_END.split(CODE_SPAN.sub("`code`", paragraph))
        if words(sentence)
    ]


def words(sentence: str) -> int:
    """Runs of characters with a letter or a digit in them; a link's address is none."""
    text = re.sub(r"\]\([^)]*\)", "]", sentence)
    return sum(any(c.isalnum() for c in word) for word in text.split())


def mean_sentence(page: str) -> float:
    return mean(map(words, sentences(page)))


def words_outside_code(page: str) -> int:
    """Everything but fenced code, as `sed '/^```/,/^```/d' README.md | wc -w` counts."""
    return len(FENCE.sub("", page).split())


def links(page: str) -> list[str]:
    """Addresses of links and pictures, those in code excepted."""
    text = CODE_SPAN.sub("", FENCE.sub("", page))
    return [next(filter(None, found)) for found in LINK.findall(text)]


def anchors(page: str) -> set[str]:
    """What `#...` may name in a page: its headings as GitHub writes them."""
    titles = HEADING.findall(FENCE.sub("", page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def tracked_files(root: Path = ROOT) -> set[Path]:
    """Files that git has or would add, of those that exist."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, check=True, text=True, capture_output=True).stdout
    return {path for name in names.split("\0") if name and (path := root / name).is_file()}


def broken_links(files: set[Path], root: Path = ROOT) -> list[str]:
    """`page: address` of every relative link that leads to no file, folder or heading."""
    folders = {folder for path in files for folder in path.parents}
    known = files | {folder for folder in folders if folder.is_relative_to(root)}
    broken = []
    for page in sorted(path for path in files if path.suffix == ".md"):
        for address in links(page.read_text()):
            if re.match(r"[a-z][a-z0-9+.-]*:|//", address):
                continue
            name, _, anchor = address.partition("#")
            target = (page.parent / name).resolve() if name else page
            lost = target not in known
            if not lost and anchor and target.suffix == ".md":
                lost = anchor not in anchors(target.read_text())
            if lost:
                broken.append(f"{page.relative_to(root)}: {address}")
    return broken


def problems(readme: str) -> list[str]:
    """What is wrong with the README's length, a sentence each."""
    found = []
    if (count := words_outside_code(readme)) > MAX_README_WORDS:
        found.append(f"README.md has {count} words outside code, at most {MAX_README_WORDS}")
    if (length := mean_sentence(readme)) > MAX_MEAN_SENTENCE:
        found.append(
            f"README.md has {length:.1f} words a sentence, at most {MAX_MEAN_SENTENCE} on average"
        )
    return found


def main() -> None:
    files = tracked_files()
    for page in sorted(path for path in files if path.suffix == ".md"):
        text = page.read_text()
        length = f"{mean_sentence(text):5.1f}" if sentences(text) else "    -"
        print(f"{words_outside_code(text):6} words {length} a sentence  {page.relative_to(ROOT)}")
    found = problems((ROOT / "README.md").read_text())
    found += [f"no such target: {link}" for link in broken_links(files)]
    print("\n".join(found))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
