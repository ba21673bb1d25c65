"""Text as a terminal measures it, in cells: a wide character takes two, a combining one none, a colour code none.

Every column, bar and cut is counted here, so that rows stay straight whatever a model's folder is called.
"""

import re

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def width(text: str) -> int:
    """Cells that the text takes."""
    if "\x1b" in text:
        text = COLOUR.sub("", text)
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(each: str) -> int:
    import unicodedata  # 2 ms, for those who need it

    if unicodedata.category(each) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(each) in "WF" else 1


def pad(text: str, cells: int) -> str:
    return text + " " * (cells - width(text))


def head(text: str, most: int) -> str:
    """Its beginning, marked where it is cut; colours are kept, and end."""
    if width(text) <= most:
        return text
    kept, left = "", most - 1
    for part in re.split(f"({COLOUR.pattern})", text):
        if part.startswith("\x1b"):
            kept += part
            continue
        for each in part:
            left -= _cells(each)
            if left < 0:
                return f"{kept}…" + ("\x1b[0m" if "\x1b" in kept else "")
            kept += each
    return kept


def tail(text: str, most: int) -> str:
    """The end of a path or Hub id says which model it is; its beginning is alike for all."""
    if width(text) <= most:
        return text
    kept, left = "", most - 1
    for each in reversed(text):
        left -= _cells(each)
        if left < 0:
            break
        kept = each + kept
    return f"…{kept}"


def wrap(text: str, room: int) -> list[str]:
    """Lines of at most `room` cells, broken between words; a longer word stays whole, so that a path can be copied."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and width(longer) > room:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
