"""What a former daemon of the same folders left without a record: a state file that was lost, a launch server that hangs.

Only what is surely ours: the runtime folder is locked by this daemon, a launch's id is in it and in the name of its log, and an engine
is known by writing to that log. A launch server ends when its daemon does; one that did not is known by its log and a dead daemon.
"""

import os
import re
import signal
from collections.abc import Callable, Collection
from pathlib import Path

from orchestrator.drivers import kvcached, processes
from orchestrator.drivers.engine_run import Run
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import ModelSpec

LAUNCH_ID = re.compile(r"[0-9a-f]{8}")
WORKERS = re.compile(r"kvcached-tp-(orch-.*-[0-9a-f]{8})-[0-9a-f]{8}")
UNKNOWN = "unknown"


def unrecorded(engines: Path, recorded: Collection[str]) -> list[Path]:
    """Folders of launches that no record names."""
    if not engines.is_dir():
        return []
    return sorted(path for path in engines.iterdir() if LAUNCH_ID.fullmatch(path.name) and path.name not in recorded)


def run(folder: Path, logs: Path, notify: Callable[[], None]) -> Run:
    """That launch, as far as it is known: enough to end it and to remove its segment, sockets and folder."""
    launch_id = folder.name
    log = next(iter(sorted(logs.glob(f"*.{launch_id}.log"))), logs / f"{UNKNOWN}.{launch_id}.log")
    spec = ModelSpec.model_construct(name=UNKNOWN, source=UNKNOWN)
    found = Run(Launch(launch_id, _ipc_name(launch_id), spec, (), 0, 0, 0), folder, log, notify, adopted=True)
    found.process = processes.writing_to(log)
    found.alive = False  # not for anybody's use
    return found


def _ipc_name(launch_id: str) -> str:
    """It ends with the id, which no other launch has; the model's part of it is known only from what lies there."""
    names = [path.name for path in kvcached.SHM.glob(f"orch-*-{launch_id}")]
    names += [match[1] for path in Path("/tmp").glob(f"kvcached-tp-orch-*-{launch_id}-*") if (match := WORKERS.fullmatch(path.name))]
    return names[0] if names else f"orch-{UNKNOWN}-{launch_id}"


def end_launch_servers(logs: Path) -> None:
    for log in sorted(logs.glob("launch-server-*.log")):
        server = processes.writing_to(log)
        if server is not None and not _has_daemon(server.pid):
            processes.signal_session(server, signal.SIGKILL)


def _has_daemon(pid: int) -> bool:
    """Another one that lives. This process is none: where it became its own successor, it has started no launch server yet."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        return parent != os.getpid() and b"orchestrat" in Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False
