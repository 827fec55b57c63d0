"""What the tests of the documentation share: the pages, their fenced blocks, their headings."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import attrs

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "ayder"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@attrs.frozen
class Example:
    """A block that runs, and the block after it that shows what it prints, if there is one."""

    line: int
    language: str
    code: str
    shown_as: str = ""
    shown: str = ""


def examples(text: str) -> Iterator[Example]:
    """Every ``sh`` and ``python`` block in order."""
    blocks = [(text.count("\n", 0, found.start()) + 1, found[1], found[2]) for found in _BLOCK.finditer(text)]
    for (line, language, code), (_, shown_as, shown) in zip(blocks, [*blocks[1:], (0, "", "")], strict=True):
        if language in ("sh", "python"):
            if shown_as in ("json", "text"):
                yield Example(line, language, code, shown_as, shown)
            else:
                yield Example(line, language, code)


def without_blocks(text: str) -> str:
    return _BLOCK.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
