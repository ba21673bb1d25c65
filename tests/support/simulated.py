"""Real engines for tests: a Launcher whose engines are simulated ones on simulated GPUs, in a folder with a short path.

Nothing outlives `close`: every process that was started from the folder is killed (each has its path in its command line), and
the segments and socket folders of every launch are removed, whether the test passed or not.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import struct
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from orchestrator.drivers import kvcached, processes
from orchestrator.drivers.launcher import Launcher
from orchestrator.drivers.simgpu import SimGpus
from orchestrator.drivers.vllm import EngineApi, EngineVenv
from orchestrator.errors import StoreError
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import EngineSeen
from orchestrator.policy.units import GIB, MIB
from tests.support.eventually import DEADLINE_S, eventually

# Two layers of 8 KV heads: a bundle of 8 MiB holds 1024 tokens, and one character is a token.
TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
BUNDLE = 8 * MIB
CEILING = 50 * BUNDLE
CARD = 16 * GIB


class Records:
    """A store of engine records. It outlives its Launcher, as the real one outlives a daemon."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.broken = False

    async def put_engine(self, launch_id: str, record: Mapping[str, object]) -> None:
        self._check()
        self.kept[launch_id] = json.loads(json.dumps(record))

    async def remove_engine(self, launch_id: str) -> None:
        self._check()
        self.kept.pop(launch_id, None)

    async def engines(self) -> Mapping[str, Mapping[str, Any]]:
        return dict(self.kept)

    def _check(self) -> None:
        if self.broken:
            raise StoreError("state.db: disk I/O error; nothing was changed")


class Workshop:
    """`launcher` is that of the daemon of now; `restart` lets it die without a word and makes the next one."""

    def __init__(self, count: int = 1) -> None:
        processes.adopt_orphans()  # as the daemon does
        self.root = Path(tempfile.mkdtemp(prefix="orch-test-", dir="/tmp"))
        (self.root / "gpu").mkdir()
        self.gpus = SimGpus(self.root / "gpu", count, CARD)
        self.model = self.root / "tiny"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(TINY))
        self.records = Records()
        self.notified = 0
        self.venvs = {
            "default": EngineVenv(
                kind="simulated",
                env={"SIM_GPU_DIR": str(self.root / "gpu"), "SIM_LOAD_S": "0", "SIM_CORE_WATCHDOG_S": "0.05"},
                stop_grace_s=5.0,
            )
        }
        self.launches: list[Launch] = []
        self._children: list[processes.Child] = []
        self.launcher = self.new_launcher()

    def new_launcher(self) -> Launcher:
        return Launcher(self.venvs, self.root / "run", self.root / "logs", self.records, self._notify)

    def _notify(self) -> None:
        self.notified += 1

    def launch(self, name: str = "tiny", fault: str = "", on: tuple[str, ...] = ("GPU-sim-0",), **fields: Any) -> Launch:
        fields.setdefault("source", str(self.model))
        if fault:
            fields["env"] = {"SIM_FAULT": fault}
        spec = ModelSpec.model_validate({"name": name, **fields})
        launch_id = secrets.token_hex(4)
        self.launches.append(Launch(launch_id, f"orch-test-{launch_id}", spec, on, 4 * GIB, 10 * BUNDLE, CEILING))
        return self.launches[-1]

    def start(self, name: str = "tiny", fault: str = "", **fields: Any) -> Launch:
        launch = self.launch(name, fault, **fields)
        self.launcher.start(launch)
        return launch

    async def started(self, name: str = "tiny", fault: str = "", **fields: Any) -> Launch:
        return await self.ready(self.start(name, fault, **fields))

    async def ready(self, launch: Launch) -> Launch:
        await eventually(lambda: self.seen(launch).ready or self.seen(launch).error, f"{launch.id} is ready")
        assert self.seen(launch).error is None, self.seen(launch)
        return launch

    async def failed(self, launch: Launch) -> str:
        return str(await eventually(lambda: self.seen(launch).error, f"{launch.id} has failed"))

    async def stopped(self, launch: Launch) -> None:
        self.launcher.stop(launch.id)
        await eventually(lambda: self.seen(launch).gone, f"{launch.id} is gone")

    def seen(self, launch: Launch) -> EngineSeen:
        return self.launcher.look()[launch.id]

    def api(self, launch: Launch) -> EngineApi:
        """The Launcher's own connection to a ready engine."""
        api = self.launcher._runs[launch.id].api
        assert api is not None
        return api

    async def complete(self, launch: Launch, prompt: str = "x", max_tokens: int = 1) -> str:
        """The first word of an answer: a simulated engine says its name."""
        body = {"model": launch.spec.name, "prompt": prompt, "max_tokens": max_tokens}
        answer = await self.api(launch)._http.post("/v1/completions", json=body)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"]).split()[0]

    async def until_waiting(self, launch: Launch) -> None:
        """Until a request waits for KV memory in the engine. Each look is a round trip."""
        async with asyncio.timeout(DEADLINE_S):
            while (await self.api(launch).rpc("kv_status"))["requests_waiting"] == 0:
                pass

    def pid(self, launch: Launch) -> int:
        pid = self.seen(launch).pid
        assert pid is not None
        return pid

    def core(self, launch: Launch) -> int:
        (core,) = self.seen(launch).pids - {self.pid(launch)}
        return core

    def used_bytes(self, index: int = 0) -> int:
        return self.gpus.read()[index].used_bytes

    def take_foreign(self, size_bytes: int, index: int = 0) -> None:
        """Memory of somebody else: of this very process."""
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        (self.root / f"gpu/held/GPU-sim-{index}/{os.getpid()}.{started}").write_bytes(struct.pack("=q", size_bytes))

    def log(self, launch: Launch) -> Path:
        return self.launcher._runs[launch.id].log

    def leftovers(self, launch: Launch) -> list[str]:
        """Whatever of a launch is still there: processes, segment, socket folders, record."""
        sockets = Path("/tmp").glob(f"kvcached-tp-{launch.ipc_name}-*")
        paths = [kvcached.SHM / launch.ipc_name, self.root / "run/engines" / launch.id, *sockets]
        record = ["record"] if launch.id in self.records.kept else []
        return [*(str(path) for path in paths if path.exists()), *map(str, self.processes(launch.id)), *record]

    def processes(self, text: str = "") -> list[int]:
        """Living processes that were started from this folder, with `text` in their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if str(self.root) in line and text in line and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    async def restart(self) -> None:
        """The daemon is killed and comes again: engines go on, all that is known of them is in the records."""
        await self._abandon()
        self.launcher = self.new_launcher()

    async def _abandon(self) -> None:
        for run in self.launcher._runs.values():
            run.unwatch()
            for task in run.tasks.values():
                task.cancel()
            await asyncio.gather(*run.tasks.values(), return_exceptions=True)
            if run.api is not None:
                await run.api.close()
            if run.child is not None:
                self._children.append(run.child)
        await self.launcher.close()

    async def close(self) -> None:
        await self._abandon()
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.01)
        for child in self._children:
            child.wait()
        processes.adopt_orphans(False)
        processes.reap()
        for launch in self.launches:
            kvcached.remove(launch.ipc_name)
        shutil.rmtree(self.root)


@contextlib.asynccontextmanager
async def workshop(count: int = 1) -> AsyncIterator[Workshop]:
    shop = Workshop(count)
    try:
        yield shop
    finally:
        await shop.close()
