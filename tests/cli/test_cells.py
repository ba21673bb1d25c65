"""Text in cells: what is padded is as wide as it should be, what is cut is no wider, and nothing is lost where it fits."""

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cli import cells, tables

TEXT = st.text(st.sampled_from("ab/-. é模型日本\u0301\u200bＡ🙂"), max_size=40)


def test_wide_and_combining_characters_are_counted_as_shown() -> None:
    assert [cells.width(text) for text in ("abc", "模型", "e\u0301", "\x1b[32mready\x1b[0m", "")] == [3, 4, 1, 5, 0]


@settings(derandomize=True, deadline=None)
@given(TEXT, st.integers(1, 50))
def test_a_cut_is_never_wider_and_what_fits_stays(text: str, most: int) -> None:
    for cut in (cells.head(text, most), cells.tail(text, most)):
        assert cells.width(cut) <= most
        assert cut == text if cells.width(text) <= most else "…" in cut
    assert cells.width(cells.pad(cells.head(text, most), most)) == most


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab模"), min_size=1, max_size=9), min_size=1), st.integers(9, 30))
def test_wrapping_loses_no_word_and_breaks_none(words: list[str], room: int) -> None:
    lines = cells.wrap(" ".join(words), room)
    assert " ".join(lines).split() == words
    assert all(cells.width(line) <= room or " " not in line for line in lines)


def test_colours_of_what_is_cut_end() -> None:
    assert cells.head("\x1b[31mreddish\x1b[0m", 4) == "\x1b[31mred…\x1b[0m"


def test_columns_stay_straight_beside_wide_names() -> None:
    rows = tables.table(("NAME", "END"), [["模型", "x"], ["plain", "x"]]).split("\n")
    assert {cells.width(row[: row.rindex("x")]) for row in rows[1:]} == {7}
