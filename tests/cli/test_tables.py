"""Sizes, durations and columns as people read them."""

import pytest

from orchestrator.cli import tables

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("bytes_", "shown"),
    [
        (None, "-"),
        (0, "0MiB"),
        (24, "0.0MiB"),
        (MIB // 2, "0.5MiB"),
        (MIB, "1MiB"),
        (640 * MIB, "640MiB"),
        (1023 * MIB, "1023MiB"),
        (1024 * MIB - 1, "1.0GiB"),
        (GIB, "1.0GiB"),
        (140 * GIB + GIB // 2, "140.5GiB"),
        (-640 * MIB, "-640MiB"),
    ],
)
def test_size(bytes_: int | None, shown: str) -> None:
    assert tables.size(bytes_) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0.4, "0s"),
        (3.9, "3s"),
        (59.9, "59s"),
        (312, "5m12s"),
        (60, "1m00s"),
        (7380, "2h03m"),
        (100_000, "27h46m"),
        (371_000, "4d07h"),
    ],
)
def test_duration(seconds: float | None, shown: str) -> None:
    assert tables.duration(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0, "0s"), (-1, "0s"), (0.03, "0.03s"), (0.333, "0.33s"), (0.5, "0.5s"), (1.0, "1s"), (4.26, "4.3s"), (9.96, "9s"),
     (12.3, "12s"), (312, "5m12s")],
)  # fmt: skip
def test_seconds_of_what_may_take_less_than_one(seconds: float | None, shown: str) -> None:
    assert tables.seconds(seconds) == shown


def test_a_wide_table_shortens_one_column_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["m", "/very/long/path/to/the/models/of/all/Qwen2.5-7B", "x"]]
    assert "/very/long" in tables.table(("NAME", "SOURCE", "END"), rows, elastic="SOURCE")
    monkeypatch.setattr("orchestrator.cli.screen.width", lambda: 30)
    line = tables.table(("NAME", "SOURCE", "END"), rows, elastic="SOURCE").splitlines()[1]
    assert len(line) <= 30
    assert line.split()[1].startswith("…")
    assert line.split()[1].endswith("Qwen2.5-7B")
