"""Sizes and durations: what is read as what, and what is refused, always as a ValueError that says how to write it.

YAML hands over whatever a person typed, so any value at all must come out as a number in range or as that error.
"""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from orchestrator.policy.units import GIB, KIB, MAX_BYTES, MIB, TIB, Duration, Size, parse_duration, parse_size, show_bytes

ANYTHING = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=12),
    st.from_regex(r"\d{1,25}(\.\d{1,5})?\s?([KMGTkmgt]i?B?|[dhms])?", fullmatch=True),
    st.sampled_from((10**400, -(10**400), "9" * 400, "9" * 400 + "G", "9" * 400 + "s", "9" * 5000, [], {})),
)
look = settings(max_examples=100, derandomize=True, deadline=None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (123, 123),
        (2.0, 2),
        ("123", 123),
        ("123B", 123),
        (" 2GiB ", 2 * GIB),
        ("512MiB", 512 * MIB),
        ("2.5GiB", 5 * GIB // 2),
        ("3G", 3 * GIB),
        ("4K", 4 * KIB),
        ("1KiB", KIB),
        ("1T", TIB),
        ("1024TiB", MAX_BYTES),
        ("1.1GiB", int(1.1 * GIB)),  # not a whole number of bytes: rounded down
        ("0.3M", int(0.3 * MIB)),
    ],
)
def test_a_size_is_read(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("12 GB", "ambiguous.*12GiB"),
        ("12GB", "ambiguous.*12GiB"),
        ("1.5 TB", "ambiguous.*1.5TiB"),
        ("12 GiB", "without a space"),
        ("12gib", "not a size"),
        ("GiB", "not a size"),
        ("1.5", "not a size"),
        ("-1", "not a size"),
        ("1e99", "not a size"),
        ("", "not a size"),
        ("a lot", "not a size"),
        ("nan", "not a size"),
        ("1025TiB", "between 0 and 1024TiB"),
        (-1, "between 0 and 1024TiB"),
        (1e99, "between 0 and 1024TiB"),
        (1.5, "between 0 and 1024TiB"),
        (math.nan, "between 0 and 1024TiB"),
        (math.inf, "between 0 and 1024TiB"),
        (10**400, "between 0 and 1024TiB"),
        ("9" * 400 + "G", "between 0 and 1024TiB"),
        (MAX_BYTES + 1, "between 0 and 1024TiB"),
        (True, "not a size"),
        (None, "not a size"),
        ([1], "not a size"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_size_is_refused_with_the_mend(text: object, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse_size(text)
    assert re.search(r"write (it like|digits|[\d.]+[KMGT]iB)", str(caught.value))
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (1, 1.0),
        (0.25, 0.25),
        ("90", 90.0),
        ("1.5", 1.5),
        ("90s", 90.0),
        ("0.5s", 0.5),
        (" 10m ", 600.0),
        ("1h30m", 5400.0),
        ("2d", 172_800.0),
        ("1d2h3m4.5s", 93_784.5),
        ("366d", 366 * 86400.0),
    ],
)
def test_a_duration_is_read(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "m", "1h30", "30m1h", "1.5h", "-1s", "1 h", "10 minutes", "nan", "inf", "1e3", "367d", "9" * 400 + "s", "0s"),
        *(0, -1, 1e99, 10**400, math.nan, math.inf, True, None, [1]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_duration_is_refused_with_the_mend(text: object) -> None:
    with pytest.raises(ValueError, match="write it like 90s, 10m or 1h30m"):
        parse_duration(text)


@look
@given(ANYTHING)
def test_any_value_is_a_size_in_range_or_a_value_error(value: object) -> None:
    try:
        size = parse_size(value)
    except ValueError:
        return
    assert type(size) is int
    assert 0 <= size <= MAX_BYTES


@look
@given(ANYTHING)
def test_any_value_is_a_duration_in_range_or_a_value_error(value: object) -> None:
    try:
        seconds = parse_duration(value)
    except ValueError:
        return
    assert type(seconds) is float
    assert 0 < seconds <= 366 * 86400


@look
@given(st.integers(0, MAX_BYTES), st.sampled_from(("", "B", "K", "KiB", "M", "MB?", "GiB", "T")))
def test_whole_numbers_of_a_unit_are_exact(number: int, unit: str) -> None:
    factor = {"K": KIB, "M": MIB, "G": GIB, "T": TIB}.get(unit[:1], 1)
    text = f"{number // factor}{unit.removesuffix('B?')}"
    assert parse_size(text) == number // factor * factor


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0MiB"), (640 * MIB, "640MiB"), (9 * GIB, "9216MiB"), (10 * GIB, "10.0GiB"), (12.34 * GIB, "12.3GiB"), (-3 * MIB, "-3MiB")],
)
def test_sizes_are_shown_short(size: float, text: str) -> None:
    assert show_bytes(size) == text


class Fields(BaseModel):
    size: Size = 0
    wait: Duration = 1.0


def test_a_field_takes_what_the_parsers_take_and_reports_what_they_refuse() -> None:
    assert Fields.model_validate({"size": "2GiB", "wait": "10m"}) == Fields(size=2 * GIB, wait=600.0)
    with pytest.raises(ValidationError, match="write 12GiB"):
        Fields.model_validate({"size": "12 GB"})
    with pytest.raises(ValidationError, match="not a duration"):
        Fields.model_validate({"wait": "soon"})


@pytest.mark.parametrize("text", ["123", "2.5GiB", "3G", "1KiB"])
def test_the_schema_knows_the_ways_to_write_a_size(text: str) -> None:
    pattern = Fields.model_json_schema()["properties"]["size"]["anyOf"][1]["pattern"]
    assert re.search(pattern, text)
    parse_size(text)


@pytest.mark.parametrize("text", ["90", "1.5", "90s", "1h30m", "2d"])
def test_the_schema_knows_the_ways_to_write_a_duration(text: str) -> None:
    pattern = Fields.model_json_schema()["properties"]["wait"]["anyOf"][1]["pattern"]
    assert re.search(pattern, text)
    parse_duration(text)
