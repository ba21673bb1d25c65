"""top: a frame fits its terminal, adds up, and says who is most active."""

import re

import pytest

from orchestrator.cli import cells, top

from .conftest import Ctl
from .running import Terminal, environment
from .stub_daemon import GIB, Json, Reply, StubDaemon, gpu, model, status

EVENT: Json = {"at": 1.8e9, "model": "org/qwen", "kind": "asleep", "reason": "idle for 300s, and a longer reason than any terminal is wide"}


@pytest.fixture
def busy(daemon: StubDaemon) -> StubDaemon:
    many = [model(f"org/model-{number:03}", "stopped" if number % 2 else "asleep", idle_s=float(number)) for number in range(198)]
    daemon.models = [*many, model("busy/模型", in_flight=7, waiting=2, idle_s=0.0), model("calm", idle_s=1.0)]
    daemon.replies["GET", "/status"] = Reply(200, status(gpus=[gpu(0), gpu(1, error="GPU_IS_LOST")]))
    daemon.replies["GET", "/events"] = Reply(200, {"events": [EVENT] * 5})
    return daemon


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 160])
@pytest.mark.parametrize("lines", [12, 24, 60])
def test_a_frame_fits_its_terminal(busy: StubDaemon, sock: str, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cli.screen.width", lambda: columns)
    monkeypatch.setattr("orchestrator.cli.screen.height", lambda: lines)
    found = status(gpus=[gpu(0)])
    shown = top.frame(found, busy.models, [EVENT] * 5, top.Rates()).split("\n")
    assert max(map(cells.width, shown)) <= columns
    assert len(shown) <= max(lines, 13)  # two models are shown in any case
    rows = [line for line in shown if line.startswith(("busy", "calm", "org", "…"))]
    assert rows[0].startswith("busy/模型")
    left = 200 - len(rows)
    assert any(line.startswith(f"+{left} more: ") or f"+{left} more" in line for line in map(_bare, shown))


def test_a_pipe_gets_all_of_it_once(busy: StubDaemon, ctl: Ctl) -> None:
    busy.replies["GET", "/metrics/engines"] = Reply(404, b"")
    said = ctl("top")
    assert said.exit_code == 0
    assert sum(line.startswith("org/model") for line in said.stdout.splitlines()) == 198
    assert "GPU 1: GPU_IS_LOST" in said.stdout
    assert "\x1b" not in said.stdout


def test_without_colour_the_parts_of_a_card_are_still_told_apart(busy: StubDaemon, sock: str) -> None:
    with Terminal("top", "--once", env=environment(ORCH_HOST=sock, NO_COLOR="1")) as terminal:
        assert terminal.end() == 0
    assert "\x1b" not in terminal.raw
    bar = re.search(r"GPU 0  \[(.*)\]", terminal.text)
    assert bar is not None
    assert [each for each in dict.fromkeys(bar[1])] == ["█", "▓", "▞", "·", " "]  # no claims


def test_a_terminal_that_lacks_the_blocks_gets_letters(busy: StubDaemon, sock: str) -> None:
    with Terminal("top", "--once", env=environment(ORCH_HOST=sock, PYTHONIOENCODING="ascii", TERM="dumb")) as terminal:
        assert terminal.end() == 0
    assert re.search(r"GPU 0  \[#+=+x+\.* +\]", terminal.text)


@pytest.mark.parametrize("wide", [1, 7, 40, 133])
def test_the_parts_of_a_bar_are_together_the_bar(wide: int) -> None:
    for amounts in ([34, 6, 0, 10, 2, 88], [0] * 6, [0, 0, 0, 0, 0, 1], [GIB, 1, 1, 1, 1, 1]):
        assert cells.width(top._stack(amounts, wide)) == (wide if any(amounts) else 0)


def test_rates_are_of_the_last_seconds_and_survive_a_restart() -> None:
    rates = top.Rates()
    for at, written in ((0.0, 1000), (2.0, 1100), (4.0, 1300), (6.0, 40), (8.0, 100), (30.0, 2000), (32.0, 2100)):
        rates.see(f'x 1\nvllm:generation_tokens_total{{model="a",engine="0"}} {written:e}\nvllm:other{{model="b"}} 1', at)
        expected = {0.0: None, 2.0: 50.0, 4.0: 75.0, 6.0: None, 8.0: 30.0, 30.0: None, 32.0: 50.0}[at]
        assert rates.of("a") == (None if expected is None else pytest.approx(expected)), at
        assert rates.of("b") is None


def _bare(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)
