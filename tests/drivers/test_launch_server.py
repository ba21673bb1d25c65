"""Launch servers as real processes: what they fork is told apart by nothing from what was executed, and never comes twice or unasked."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator.drivers import launch_server, processes
from orchestrator.drivers.launch_control import NoFork
from tests.support.eventually import DEADLINE_S, eventually
from tests.support.probes import PROBE, Bench, said

pytestmark = pytest.mark.asyncio


# ---- what is forked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "code"), [("0", 0), ("3", 3)])
async def test_its_exit_code_is_seen(bench: Bench, word: str, code: int) -> None:
    process, child = await bench.fork(word)
    assert child.wait(DEADLINE_S) == code
    assert not psutil.pid_exists(process.pid)  # and it is buried


async def test_a_signal_that_ended_it_is_seen_and_its_end_noticed(bench: Bench) -> None:
    process, child = await bench.fork()
    noticed: list[int] = []
    processes.on_exit(process, lambda: noticed.append(1))
    assert processes.alive(process)
    assert child.poll() is None
    child.kill()
    await eventually(lambda: noticed, "its end")
    assert child.poll() == -signal.SIGKILL
    child.kill()  # the pid is nobody's now


async def test_what_it_finds_is_what_an_executed_one_finds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIM_LEAK", "of the server")
    await bench.server()
    monkeypatch.delenv("SIM_LEAK")
    log = bench.log()
    process, _ = await bench.fork(log=log, SIM_MINE="1")
    found = await said(log)
    assert found["argv"] == ["orchestrator.engine.simulator", "wait", "--uds", str(bench.root / "api.sock")]
    assert found["environ"] == bench.env(SIM_MINE="1") | {"SET_BY_AN_IMPORT": "1"}
    assert (found["c_ipc_name"], found["c_leak"]) == ("b'orch-probe'", "None")  # what C++ sees
    assert found["cwd"] == "/"
    assert found["sid"] == found["pid"] == process.pid == os.getpgid(process.pid)
    assert found["fds"] == {"0": "/dev/null", "1": str(log), "2": str(log)}
    assert found["blocked"] == []
    assert psutil.Process(process.pid).ppid() == os.getpid()
    assert psutil.Process(process.pid).cmdline()[:4] == [sys.executable, "-m", "orchestrator.engine.simulator", "wait"]
    proc = Path(f"/proc/{process.pid}")
    assert (proc / "oom_score_adj").read_text().strip() == str(processes.ENGINE_OOM_SCORE)
    assert "of the server" not in (proc / "environ").read_text()


async def test_no_two_are_alike_by_chance(bench: Bench) -> None:
    logs = [bench.log(), bench.log()]
    for log in logs:
        await bench.fork("0", log)
    assert len({(await said(log))["random"] for log in logs}) == 2


async def test_many_at_once_are_as_many_engines_of_one_server(bench: Bench) -> None:
    logs = [bench.log() for _ in range(8)]
    forked = await asyncio.gather(*(bench.fork(log=log) for log in logs))
    assert [(await said(log))["pid"] for log in logs] == [process.pid for process, _ in forked]
    assert (await bench.status())["forks"] == 8
    assert len(bench.forks()) == 8


async def test_an_environment_that_may_have_been_read_already_is_refused(bench: Bench) -> None:
    with pytest.raises(NoFork, match="its env has HF_HUB_OFFLINE, KVCACHED_MIN_RESERVED_PAGES, which is read once"):
        await bench.fork(HF_HUB_OFFLINE="1", KVCACHED_MIN_RESERVED_PAGES="5")
    assert (await bench.status())["state"] == "off"  # nor was it needed
    await bench.fork(KVCACHED_MAX_CACHED_TOKENS="9", NCCL_DEBUG="INFO", HF_TOKEN="x")


# ---- a server that dies ---------------------------------------------------------------------------------------------


async def test_engines_outlive_it_and_another_one_takes_its_place(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_server, "BACKOFF_S", 0.01)
    process, child = await bench.fork()
    first = await bench.server()
    os.kill(first, signal.SIGKILL)
    second = await bench.server(but=first)
    await bench.fork()
    assert await bench.server() == second
    assert processes.alive(process)
    assert child.poll() is None
    await eventually(lambda: not psutil.pid_exists(first), "the dead one is buried")


async def test_killed_before_a_launch(bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(launch_server, "BACKOFF_S", DEADLINE_S)
    os.kill(await bench.server(), signal.SIGKILL)
    for _ in range(2):  # the second does not even ask
        with pytest.raises(NoFork, match=r"its launch server failed: it .*SIGKILL|its launch server failed: it can not be asked"):
            await bench.fork()
    assert (await bench.status())["state"] == "failed"
    assert bench.forks() == []
    assert "until then engines are started by exec" in caplog.text


@pytest.mark.parametrize("then", ["killed", "left alone"])
async def test_one_that_stands_still_starts_no_engine_then_nor_later(bench: Bench, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, log = await bench.server(), bench.log()
    monkeypatch.setattr(launch_server, "ANSWER_S", DEADLINE_S if then == "killed" else 0.2)
    os.kill(server, signal.SIGSTOP)
    asked = asyncio.ensure_future(bench.fork(log=log))
    await eventually(log.exists, "it was asked")
    if then == "killed":
        os.kill(server, signal.SIGKILL)
    why = "it was killed by SIGKILL" if then == "killed" else "it said nothing for 0.2 s"
    with pytest.raises(NoFork, match=f"{why} while it was asked for an engine"):
        await asked
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGCONT)
    await eventually(lambda: not psutil.pid_exists(server), "it is ended")
    assert bench.forks() == []
    assert log.read_text() == ""


async def test_a_launch_that_was_given_up_does_not_get_into_the_next_ones_way(bench: Bench) -> None:
    server, logs = await bench.server(), [bench.log(), bench.log()]
    os.kill(server, signal.SIGSTOP)
    asked = asyncio.ensure_future(bench.fork(log=logs[0]))
    await eventually(logs[0].exists, "it was asked")
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    os.kill(server, signal.SIGCONT)
    process, _ = await bench.fork(log=logs[1])
    assert (await said(logs[1]))["pid"] == process.pid
    await eventually(lambda: bench.forks() == [process.pid], "what was forked for nobody has ended")
    assert logs[0].read_text() == ""
    assert await bench.server() == server
    assert (await bench.status())["forks"] == 1


# ---- a server that does not come up ---------------------------------------------------------------------------------


async def test_what_can_not_be_imported_is_told_and_not_tried_again_until_the_venv_changes(bench: Bench) -> None:
    bench.probe("raise ImportError('no module named vllm')")
    with pytest.raises(NoFork, match=r"its launch server failed: ImportError: no module named vllm; see .*launch-server-default\.log"):
        await bench.fork()
    assert "Traceback" in (bench.root / "launch-server-default.log").read_text()
    bench.probe(PROBE)
    with pytest.raises(NoFork, match="no module named vllm"):
        await bench.fork()
    status = await bench.status()
    assert (status["state"], status["pid"]) == ("failed", None)
    assert "no module named vllm" in status["reason"]
    os.utime(bench.kvcached, (1, 1))
    await bench.fork()
    assert (await bench.status())["state"] == "ready"


@pytest.mark.parametrize(
    ("body", "why"), [("import os; os._exit(4)", "exited with code 4"), ("import os; os.abort()", "killed by SIGABRT")]
)
async def test_an_import_that_ends_the_process(bench: Bench, body: str, why: str) -> None:
    bench.probe(body)
    with pytest.raises(NoFork, match=f"it .*{why} while importing"):
        await bench.fork()


async def test_one_that_is_killed_while_it_imports_is_soon_started_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_server, "BACKOFF_S", 0.05)
    once = bench.root / "once"
    bench.probe(f"import os, pathlib, signal\nif not pathlib.Path({str(once)!r}).exists():\n"
                f"    pathlib.Path({str(once)!r}).touch(); os.kill(os.getpid(), signal.SIGKILL)\n{PROBE}")  # fmt: skip
    with pytest.raises(NoFork, match="killed by SIGKILL while importing"):
        await bench.fork()
    await bench.server()
    await bench.fork()


async def test_a_launch_does_not_wait_for_ever_for_imports_and_they_go_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_server, "READY_S", 0.2)
    pipe = bench.root / "pipe"
    os.mkfifo(pipe)
    bench.probe(f"open({str(pipe)!r}).read()\n{PROBE}")
    began = time.monotonic()
    with pytest.raises(NoFork, match=r"still imports after 0\.2 s"):
        await bench.fork()
    with pytest.raises(NoFork, match="still imports"):  # and the next not at all
        await bench.fork()
    assert time.monotonic() - began < DEADLINE_S / 2
    assert (await bench.status())["state"] == "starting"
    await asyncio.to_thread(pipe.write_text, "")
    await bench.server()
    await bench.fork()


async def test_a_python_that_is_not_there(bench: Bench) -> None:
    bench.venvs["default"] = replace(bench.venv, kind="vllm", python=bench.root / "no/bin/python")
    with pytest.raises(NoFork, match=r"could not be started: .*No such file"):
        await bench.fork()


# ---- the venv -------------------------------------------------------------------------------------------------------


async def test_another_version_in_the_venv_gets_another_server_and_the_old_one_ends(bench: Bench) -> None:
    process, _ = await bench.fork()
    first = await bench.server()
    bench.kvcached.rename(bench.kvcached.with_name("kvcached-0.1.7.dist-info"))
    await bench.fork()
    second = await bench.server()
    assert second != first
    await eventually(lambda: not psutil.pid_exists(first), "the old one has ended")
    assert processes.alive(process)
    os.utime(bench.kvcached.with_name("kvcached-0.1.7.dist-info"), (1, 1))  # built anew
    await bench.fork()
    assert await bench.server() != second
    third = await bench.server()
    await bench.fork()
    assert await bench.server() == third


async def test_what_it_says_of_itself(bench: Bench) -> None:
    assert (await bench.status())["state"] == "off"
    await bench.fork()
    status = await bench.status()
    assert (status["state"], status["reason"], status["forks"], status["threads"]) == ("ready", None, 1, 1)
    assert status["versions"] == {"simulated": "probe"}
    assert 0 < status["pss_bytes"] <= status["rss_bytes"]
    assert status["import_s"] >= 0
    assert psutil.Process(status["pid"]).ppid() == os.getpid()
    bench.venvs["other"] = replace(bench.venv, launch_server=False)
    assert list(await bench.servers.status()) == ["default"]


async def test_closed_servers_end_and_stay_away_and_engines_live_on(bench: Bench) -> None:
    process, _ = await bench.fork()
    server = await bench.server()
    await bench.servers.close()
    assert not psutil.pid_exists(server)
    assert processes.alive(process)
    assert (await bench.status())["state"] == "off"
