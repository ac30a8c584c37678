"""Links inside the project lead somewhere: files, headings, pictures and included files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts]
FENCE = re.compile(r"^(`{3,}|:{3,})(.*)$")
SHOWN = re.compile(r"\{(?:image|include|literalinclude)\} (\S+)$")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(page: Path) -> tuple[str, list[str]]:
    """A page without its blocks of code, and the files that it shows or includes."""
    prose, shown, fence = [], [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        match = FENCE.match(line)
        if fence:
            fence = "" if line == fence else fence
        elif match:
            fence = match[1]
            shown += SHOWN.findall(match[2])
        else:
            prose.append(line)
    return "\n".join(prose), shown


def headings(page: Path) -> set[str]:
    """The anchors of a page, included ones too, as GitHub and MyST make them of its headings."""
    prose, shown = read(page)
    lines = re.findall(r"^#{1,6} (.+)$", prose, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}
    included = [page.parent / name for name in shown if name.endswith(".md")]
    return anchors.union(*[headings(part) for part in included if part.exists()])


def links(page: Path) -> list[str]:
    prose, shown = read(page)
    return LINK.findall(re.sub(r"`[^`\n]+`", "", prose)) + shown


def is_broken(page: Path, link: str) -> bool:
    path, _, anchor = link.removeprefix("path:").partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return True
    return bool(anchor) and anchor not in headings(target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_inside_the_project_is_broken(page: Path) -> None:
    inside = [link for link in links(page) if not re.match(r"https?:|mailto:", link)]
    assert not [link for link in inside if is_broken(page, link)]


def test_links_are_found_and_broken_ones_told(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A *heading*, with α\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#a-heading-with-α) [b](other.md#none) [c](gone.md) `[d](code.md)`\n"
        "```{image} gone.png\n```\n```\n[e](fenced.md)\n```\n"
    )
    broken = [link for link in links(page) if is_broken(page, link)]
    assert links(page) == ["other.md#a-heading-with-α", "other.md#none", "gone.md", "gone.png"]
    assert broken == ["other.md#none", "gone.md", "gone.png"]


def test_every_page_is_in_a_contents() -> None:
    docs = ROOT / "docs"
    listed = set()
    for index in (docs / "index.md", docs / "stacks" / "index.md"):
        contents = re.findall(r"```\{toctree\}\n(.*?)```", index.read_text("utf-8"), re.S)
        lines = "\n".join(contents).splitlines()
        names = [line for line in lines if line and not line.startswith(":")]
        listed |= {(index.parent / f"{name}.md").resolve() for name in names}
    pages = {page for page in PAGES if docs in page.parents and page != docs / "index.md"}
    assert listed >= pages
