"""orchestratorctl bench as a user runs it, with real processes on a simulated GPU; ended in the middle in every way, it leaves nothing."""

import contextlib
import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import Daemon, eventually
from tests.experiments.conftest import KEEPER, SHORT, Bench, ended, heard, static_folders, static_processes

IN_OURS, IN_STATIC = "through the daemon: burst 1", "static: 2 requests to warm up"


def result(folder: Path) -> Any:
    return json.loads((folder / "out/result.json").read_text())


def nothing_is_left(daemon: Daemon) -> None:
    eventually(lambda: not static_processes(daemon), "no process of a static engine is left")
    eventually(lambda: not static_folders(daemon), "no folder of a static engine is left")


def test_single_measures_both_arms_and_leaves_the_model_as_it_was(daemon: Daemon, bench: Bench, tmp_path: Path) -> None:
    name = daemon.name("a")
    daemon.until_state(name, "ready")
    code, out, err = ended(bench("single", name, "--bursts", "1", *SHORT))
    assert (code, "Traceback" in err) == (0, False), err
    found = result(tmp_path)
    figures = found["figures"]
    assert (found["complete"], found["simulated"], figures["daemon_failed"], figures["static_failed"]) == (True, True, 0, 0)
    assert figures["daemon_idle_mib"] < figures["static_idle_mib"] / 2
    assert figures["static_idle_mib"] == pytest.approx(0.9 * 80 * 1024, rel=0.05)
    assert figures["idle_saving_vs_static"] > 0.5
    assert "SIMULATED GPU" in out
    assert "idle" in out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"vram.png", "latency.png"}
    with (tmp_path / "out/samples.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} >= {"daemon", "static"}
    daemon.until_state(name, "ready")
    nothing_is_left(daemon)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, IN_OURS), (signal.SIGTERM, IN_STATIC)])
def test_one_that_is_told_to_end_brings_the_model_back_and_keeps_what_it_has(
    daemon: Daemon, bench: Bench, tmp_path: Path, number: signal.Signals, at: str
) -> None:
    name = daemon.name("a")
    daemon.until_state(name, "ready")
    running = bench("single", name, "--bursts", "1", "--no-plots", *SHORT, "--tokens", "60")
    heard(running, at)
    running.send_signal(number)
    code, out, err = ended(running)
    assert (code, "Traceback" in err) == (130, False), err
    assert "INCOMPLETE: interrupted" in out
    found = result(tmp_path)
    assert (found["complete"], "daemon_idle_mib" in found["figures"]) == (False, True)
    daemon.until_state(name, "ready")
    nothing_is_left(daemon)


def test_one_that_is_killed_leaves_no_static_engine(daemon: Daemon, bench: Bench) -> None:
    running = bench("single", daemon.name("a"), "--bursts", "1", "--no-plots", *SHORT, "--tokens", "60")
    heard(running, IN_STATIC)
    assert static_processes(daemon)
    running.kill()
    nothing_is_left(daemon)
    daemon.tell(daemon.name("a"), "load")


def test_a_static_engine_that_dies_is_told_and_the_model_comes_back(daemon: Daemon, bench: Bench, tmp_path: Path) -> None:
    name = daemon.name("a")
    daemon.until_state(name, "ready")
    running = bench("single", name, "--bursts", "1", "--no-plots", *SHORT, "--tokens", "60")
    heard(running, IN_STATIC)
    for process in static_processes(daemon):
        if KEEPER not in process.cmdline():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    code, _, err = ended(running)
    assert code == 1
    assert "answers nothing" in err or "was killed by SIGKILL" in err
    assert result(tmp_path)["complete"] is False
    daemon.until_state(name, "ready")
    nothing_is_left(daemon)


def test_shared_takes_turns_without_static_engines_and_unloads_what_was_unloaded(daemon: Daemon, bench: Bench, tmp_path: Path) -> None:
    first, second = daemon.name("a"), daemon.name("b")
    daemon.add(second, "--no-start")
    code, out, err = ended(bench("shared", first, second, "--turns", "1", "--no-static", "--no-plots", "--json", *SHORT))
    assert code == 0, err
    told = json.loads(out)
    assert [burst["model"] for burst in told["arms"][0]["bursts"]] == [first, second]
    assert "static_idle_mib" not in told["figures"]
    daemon.until_state(second, "stopped")


def test_a_mix_tells_goodput_by_model(daemon: Daemon, bench: Bench, tmp_path: Path) -> None:
    name = daemon.name("a")
    words = ("mix", name, "--duration", "2s", "--rate", "5", "--scale", "0.02", "--calibration", "2", "--yes", "--no-plots")
    code, out, err = ended(bench(*words))
    assert code == 0, err
    found = result(tmp_path)
    assert found["figures"]["requests"] == len(found["answers"]) >= 9
    assert 0 < found["figures"][f"{name}_goodput"] <= 1
    assert "GOODPUT" in out


def test_a_static_pool_that_does_not_fit_is_refused_with_the_mend_before_anything_changes(
    daemon: Daemon, bench: Bench, tmp_path: Path
) -> None:
    name = daemon.name("a")
    launch = daemon.until_state(name, "ready")["engine"]["launch_id"]
    code, _, err = ended(bench("single", name, "--static-utilization", "1.0", "--yes"))
    assert code == 1
    assert "--static-utilization 0.9" in err
    assert daemon.model(name)["engine"]["launch_id"] == launch
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "env", "code", "told"),
    [
        (("single", "nobody"), {}, 4, "nobody"),
        (("single", "nobody"), {"ORCH_HOST": "/nowhere/admin.sock"}, 69, "no daemon"),
        (("mix", "nobody", "--on", "5s"), {}, 2, "--on and --off"),
    ],
)
def test_what_can_not_be_is_refused(bench: Bench, words: tuple[str, ...], env: dict[str, str], code: int, told: str) -> None:
    found, _, err = ended(bench(*words, "--yes", env=env))
    assert (found, told in err) == (code, True), err


def test_a_daemon_that_is_restarted_in_the_middle_ends_it(daemon: Daemon, bench: Bench, tmp_path: Path) -> None:
    """The last: the daemon is another one afterwards."""
    running = bench("single", daemon.name("a"), "--no-static", "--no-plots", "--bursts", "2", *SHORT, "--pause", "60s")
    heard(running, "burst 1 of 2")
    daemon.kill()
    daemon.start()
    code, _, err = ended(running)
    told = {1: "the daemon was restarted", 69: "no daemon at"}  # by when it asks: while there was none, or after it
    assert told[code] in err
    assert result(tmp_path)["complete"] is False
