"""The inside of a launch server, spoken to by hand; orphans, which the kernel gives to us; and a Launcher whose engines are forked."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from orchestrator.drivers import launch_control, launch_server, processes, vllm
from tests.support.eventually import DEADLINE_S, eventually, eventually_now
from tests.support.probes import PROBE, Bench, said, zombies
from tests.support.simulated import Workshop

pytestmark = pytest.mark.asyncio


# ---- the server's own manners, without a daemon ---------------------------------------------------------------------


class Raw:
    """The daemon's end of a launch server, by hand."""

    def __init__(self, bench: Bench) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(DEADLINE_S)
        with theirs:
            command = vllm.launch_server_command(bench.venv, theirs.fileno())
            env = vllm.venv_environment(bench.venv, os.environ)
            self.process, self.child = processes.spawn(command, env, bench.root / "server.log", pass_fds=(theirs.fileno(),))
        assert self.hear()["versions"] == {"simulated": "probe"}

    def hear(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.control.recv(1 << 20))
        return answer

    def ask(self, log: Path, word: str = "wait") -> int:
        """The pipe on whose byte the engine waits."""
        waits, go = os.pipe()
        message = {"id": 7, "argv": ["python", "-m", "probe", word], "env": {}}
        with open(log, "ab") as out:
            socket.send_fds(self.control, [json.dumps(message).encode()], [out.fileno(), waits])
        os.close(waits)
        return go


@pytest.fixture
def raw(bench: Bench) -> Iterator[Raw]:
    made = Raw(bench)
    yield made
    made.control.close()
    made.child.kill()
    made.child.wait()


async def test_nothing_runs_before_the_byte_and_all_of_it_after(bench: Bench, raw: Raw) -> None:
    log = bench.log()
    go = raw.ask(log)
    pid = raw.hear()["pid"]
    assert os.getsid(pid) == pid
    assert bench.forks() == [pid]
    assert log.read_text() == ""
    os.write(go, b"g")
    assert (await said(log))["pid"] == pid
    os.close(go)


@pytest.mark.parametrize("when", ["before it is forked", "after"])
async def test_without_the_byte_it_ends_without_a_word(bench: Bench, raw: Raw, when: str) -> None:
    log = bench.log()
    if when == "after":
        go = raw.ask(log)
        pid = raw.hear()["pid"]
        os.close(go)
    else:
        os.kill(raw.process.pid, signal.SIGSTOP)
        os.close(raw.ask(log))
        os.kill(raw.process.pid, signal.SIGCONT)
        pid = raw.hear()["pid"]

    def buried() -> bool:
        processes.reap()
        return not psutil.pid_exists(pid)

    await eventually(buried, "it has ended, and nobody had to know it")
    assert log.read_text() == ""


async def test_the_end_of_the_daemon_is_its_end_and_engines_live_on(bench: Bench, raw: Raw) -> None:
    log = bench.log()
    go = raw.ask(log)
    pid = raw.hear()["pid"]
    os.write(go, b"g")
    await said(log)
    raw.control.close()
    assert raw.child.wait(DEADLINE_S) == 0
    assert bench.forks() == [pid]
    os.close(go)


async def test_a_request_that_makes_no_sense_is_answered(bench: Bench, raw: Raw) -> None:
    raw.control.send(b"{")
    assert "JSONDecodeError" in raw.hear()["error"]
    raw.control.send(b'{"id": 1, "argv": [], "env": {}}')
    answer = raw.hear()
    assert answer["id"] == 1
    assert "error" in answer
    os.close(raw.ask(bench.log()))
    assert "pid" in raw.hear()
    assert len(os.listdir(f"/proc/{raw.process.pid}/fd")) == 4  # its three streams and the socket: nothing of a launch is kept


# ---- the kernel gives us orphans ------------------------------------------------------------------------------------


async def test_an_orphan_of_an_engine_becomes_ours_and_is_buried(bench: Bench) -> None:
    source = PROBE.replace("signal.pause()", "(os.fork(), signal.pause())")
    bench.probe(source)
    process, child = await bench.fork()
    await eventually(lambda: len(processes.members(process)) == 2, "a child of its own")
    (orphan,) = processes.members(process) - {process.pid}
    child.kill()
    assert child.wait(DEADLINE_S) == -signal.SIGKILL
    eventually_now(lambda: psutil.Process(orphan).ppid() == os.getpid(), "it is ours")
    assert processes.members(process) == {orphan}
    os.kill(orphan, signal.SIGKILL)
    await eventually(lambda: zombies(process.pid) == [orphan], "it is dead")
    assert processes.members(process) == frozenset()  # a zombie is nobody that must be waited for
    processes.reap()
    assert not psutil.pid_exists(orphan)


async def test_reaping_takes_no_exit_code_away(bench: Bench) -> None:
    _, child = await bench.fork("5")
    mine = await asyncio.create_subprocess_exec("sh", "-c", "exit 6")
    _, spawned = processes.spawn(["sh", "-c", "exit 7"], {"PATH": "/usr/bin:/bin"}, bench.root / "spawned.log")
    for _ in range(20):
        processes.reap()
        await asyncio.sleep(0)
    assert (child.wait(DEADLINE_S), await mine.wait(), spawned.wait(DEADLINE_S)) == (5, 6, 7)
    processes.reap()


# ---- engines of a Launcher ------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def forking(shop: Workshop) -> Workshop:
    """Simulated engines, and no process of them left over from another test."""
    shop.venvs["default"] = replace(shop.venvs["default"], launch_server=True)
    processes.reap()
    return shop


async def test_a_killed_api_server_leaves_no_zombie(forking: Workshop) -> None:
    launch = await forking.started()
    pid, core = forking.pid(launch), forking.core(launch)
    os.kill(pid, signal.SIGKILL)
    assert await forking.failed(launch) == "its process was killed by SIGKILL"
    await eventually(lambda: psutil.Process(core).ppid() == os.getpid(), "its core is ours")
    await forking.stopped(launch)
    await eventually(lambda: forking.seen(launch) and not psutil.pid_exists(core), "buried by a look")
    assert forking.leftovers(launch) == []
    assert not psutil.pid_exists(pid)


async def test_where_it_can_not_be_forked_it_is_executed_and_that_is_said_once(forking: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        launch = await forking.started(name, env={"TORCH_SOMETHING": "1"})
        assert psutil.Process(forking.pid(launch)).ppid() == os.getpid()
        assert await forking.complete(launch) == name
    assert caplog.text.count("started by exec of engine default, not forked: its env has TORCH_SOMETHING, which is read once") == 1
    assert (await forking.launcher.launch_servers())["default"]["forks"] == 0


async def test_a_server_that_stands_still_costs_no_launch(forking: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [await forking.started("first")]
    server = (await forking.launcher.launch_servers())["default"]["pid"]
    monkeypatch.setattr(launch_server, "ANSWER_S", 0.2)
    monkeypatch.setattr(launch_server, "BACKOFF_S", DEADLINE_S)
    os.kill(server, signal.SIGSTOP)
    launches += [await forking.started("second"), await forking.started("third")]
    assert [await forking.complete(launch) for launch in launches] == ["first", "second", "third"]
    assert {len(forking.processes(launch.id)) for launch in launches} == {2}  # an API server and its core each, and no more
    status = (await forking.launcher.launch_servers())["default"]
    assert (status["state"], status["forks"]) == ("failed", 1)
    assert "it said nothing for 0.2 s" in status["reason"]


async def test_a_start_is_timed_from_when_the_server_could_fork_it(forking: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    imported, ready = asyncio.Event(), launch_control.Control.ready

    async def late(control: launch_control.Control, timeout_s: float) -> None:
        await imported.wait()
        await ready(control, timeout_s)

    monkeypatch.setattr(launch_control.Control, "ready", late)
    launch = forking.start()
    await eventually(lambda: launch.id in forking.records.kept, "it waits for the server")
    waited = forking.seen(launch)
    done = time.monotonic()
    imported.set()
    await eventually(lambda: forking.seen(launch).ready, "ready")
    assert waited.started_at < done <= forking.seen(launch).started_at


async def test_stopped_while_the_server_still_imports(forking: Workshop) -> None:
    launch = forking.start()
    await eventually(lambda: launch.id in forking.records.kept, "it waits for the server")
    await forking.stopped(launch)
    assert forking.leftovers(launch) == []
    again = await forking.started()
    assert (await forking.launcher.launch_servers())["default"]["forks"] == 1  # the server of the first one is used
    assert await forking.complete(again) == "tiny"
