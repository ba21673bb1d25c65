"""The pages people read: which there are, their headings, links, code and tables. Markdown as these pages use it, and no more of it."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "<!-- From here on: python -m tests.docs -->\n"
PAGES = (ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))


def with_made(page: str, made: str) -> str:
    """Raises ValueError for a page without the mark."""
    written, mark, _ = page.partition(MARK)
    if not mark:
        raise ValueError(f"the page has no line {MARK.strip()!r}: put it where the made part begins")
    return f"{written}{mark}\n{made}"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join([_row(head), "|" + "---|" * len(head), *(_row(map(cell, row)) for row in rows)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def cell(text: str) -> str:
    """As it may stand in a table: a pipe would end the cell, and <a word> would be taken for HTML where it is no code."""
    parts = text.replace("\n", " ").replace("|", "\\|").split("`")
    return "`".join(part if at % 2 else part.replace("<", "&lt;") for at, part in enumerate(parts))


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is said to be, its lines."""

    kind: str
    lines: tuple[str, ...]


def blocks(text: str) -> Iterator[Block]:
    for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield Block(kind, tuple(body.splitlines()))


def prose(text: str) -> str:
    """Without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What a link to a heading may name, as GitHub makes it of the heading."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if number == 0 else f"{slug}-{number}" for slug, most in found.items() for number in range(most + 1)}


def links(text: str) -> list[str]:
    """Where its links and pictures lead; not those to other hosts."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(text)) + re.findall(r'(?:src|srcset)="(?!https?:)([^"]+)"', prose(text))


def section(text: str, heading: str) -> str:
    """From a heading to the next of its rank or above. Raises ValueError where there is none of it."""
    found = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no heading {heading!r}")
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", prose(rest), re.MULTILINE)
    return rest if end is None else rest[: rest.index(end[0])]


def first_cells(text: str) -> list[str]:
    """Of each row of its tables, what stands in `code` in the first cell."""
    return [code for row in re.findall(r"^\| (.*?) \|", text, re.MULTILINE) for code in re.findall(r"`([^`]+)`", row)]
