"""The machine as the settings want it: folders that are ours alone, the operators' socket, the state file, GPUs, engine venvs, rules.

All that can be wrong with them is said before anything runs: StartupError, with the setting to change.
"""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from orchestrator.control.ports import Gpus
from orchestrator.drivers import processes, sockets, vllm
from orchestrator.drivers.nvml import Nvml
from orchestrator.drivers.simgpu import SimGpus
from orchestrator.drivers.store import SqliteStore
from orchestrator.errors import StartupError
from orchestrator.policy.lifecycle import Rules
from orchestrator.settings import Settings

log = logging.getLogger("orchestrator")

FILES = 65536  # as the service unit allows
ROOM_BYTES = 128 << 10  # for the files that SQLite makes beside the state, and removes at an orderly end


@contextlib.asynccontextmanager
async def house(config: Settings) -> AsyncIterator[tuple[SqliteStore, socket.socket]]:
    """The folders, ours alone, the operators' socket and the state."""
    with contextlib.ExitStack() as held:
        os.umask(0o022)
        for folder, mode in _folders(config):
            _make(folder, mode)
        os.umask(0o077)  # also what engines make, their segments in /dev/shm and what they download, is this user's alone
        held.enter_context(_lock(config.state_dir))
        held.enter_context(_lock(config.runtime_dir))
        admin = held.enter_context(sockets.listen_unix(config.admin_socket))
        store = SqliteStore(config.state_dir / "state.db")
        await store.open()
        try:
            yield store, admin
        finally:
            await store.close()


def check(config: Settings) -> None:
    """Raises StartupError where a daemon that ends in order could not start again: a disk is full, a folder's rights are others now."""
    for folder, _ in _folders(config):
        if folder.is_dir():
            _probe(folder, ROOM_BYTES)


def gpus(config: Settings) -> tuple[Gpus, str]:
    chosen = config.gpus.source
    if chosen != "simulated":
        try:
            return Nvml(config.logs_dir / "nvml.log"), "nvml"
        except OSError as error:
            if chosen == "nvml":
                raise StartupError(str(error)) from None
            log.warning("%s; taking simulated GPUs (gpus.source: auto)", error)
    folder = config.runtime_dir / "simgpu"
    os.environ["SIM_GPU_DIR"] = str(folder)  # engines inherit it
    return SimGpus(folder, config.gpus.simulated.count, config.gpus.simulated.memory), "simulated"


def rules(config: Settings) -> Rules:
    sleepers = config.memory.sleepers if config.memory.sleepers is not None else processes.host_bytes() // 2
    return Rules(config.memory.reserve, config.requests.drain_timeout, sleepers)


def venvs(config: Settings, gpu_source: str) -> dict[str, vllm.EngineVenv]:
    """On simulated GPUs every engine is a simulated one: real ones would not start."""
    return {
        name: vllm.EngineVenv(
            kind="simulated" if gpu_source == "simulated" else engine.kind,
            python=engine.python if engine.kind == "vllm" and gpu_source != "simulated" else Path(sys.executable),
            env=engine.env,
            args=engine.args,
            stop_grace_s=engine.stop_grace,
            hang_s=engine.hang_timeout,
            launch_server=engine.launch_server,
        )
        for name, engine in config.engines.items()
    }


def allow_files() -> None:
    """Shells allow 1024 open files: a few hundred clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _folders(config: Settings) -> tuple[tuple[Path, int], ...]:
    return (
        (config.state_dir, 0o750),
        (config.runtime_dir, 0o755),
        (config.runtime_dir / "engines", 0o700),
        (config.logs_dir, 0o750),
    )


def _make(folder: Path, mode: int) -> None:
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from None
    _probe(folder, 0)  # one that crashed on a full disk starts with the files that it left


def _probe(folder: Path, size_bytes: int) -> None:
    probe = folder / f".writable.{os.getpid()}"
    try:
        try:
            probe.write_bytes(bytes(size_bytes))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from None


def _unusable(folder: Path, error: OSError) -> StartupError:
    mend = "free space on its disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable for this user"
    return StartupError(f"{folder}: {error.strerror}: {mend}, or choose another one under dirs in the config")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One daemon a folder. The kernel gives the lock back however the holder ends."""
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StartupError(f"{folder} is in use by another orchestratord (pid {holder}): stop it, or choose other dirs") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
