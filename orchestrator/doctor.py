"""What of this machine is not as the daemon needs it, each with the mend: looked at before it runs, or by itself while it does.

Nothing is changed and nothing is started but a reader of NVML, where no daemon has one. A check that fails is a finding, never a traceback.
"""

import importlib.metadata
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from orchestrator.drivers import sockets, vllm
from orchestrator.drivers.sources import Sources
from orchestrator.errors import StartupError
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import GIB, MIB, show_bytes
from orchestrator.settings import Settings

SHM = Path("/dev/shm")
SHM_BYTES = GIB  # vLLM's queues to the workers of tensor parallelism take 240 MiB a worker, kvcached 24 bytes a model
DISK_LOW_BYTES, DISK_OUT_BYTES = GIB, 64 * MIB
SEE = "see `nvidia-smi` and `dmesg`"
PACKAGES = ("vllm", "kvcached")
FILES = 8192  # two descriptors a stream, and some for each engine


@dataclass(frozen=True)
class Finding:
    """`about`: what was looked at. `mend`: what to do; "" where nothing is wrong."""

    state: Literal["ok", "warning", "bad"]
    about: str
    what: str
    mend: str = ""

    def shown(self) -> dict[str, str]:
        return asdict(self)


def examine(config: Settings, gpus: Callable[[], Sequence[GpuReading]], simulated: bool) -> list[Finding]:
    """All of it. `gpus` raises OSError, with the mend in its words, where NVML can not be asked."""
    checks = {
        "GPUs": _simulated() if simulated else _gpus(gpus),
        **{f"engines.{name}": _engine(name, config, simulated) for name in config.engines},
        "models": _models(config),
        str(SHM): _shared_memory(),
        "open files": _files(),
        **{name: _folder(name, folder) for name, folder in _folders(config).items()},
        "admin.group": _group(config),
    }
    return [found for about, check in checks.items() for found in _whatever(about, check)]


def _whatever(about: str, check: Iterator[Finding]) -> Iterator[Finding]:
    try:
        yield from check
    except OSError as error:
        yield Finding("bad", about, f"it could not be looked at: {error}", "look there as this user")


def _simulated() -> Iterator[Finding]:
    yield Finding("warning", "GPUs", "they are simulated, and so are engines and answers", "on a box with GPUs: gpus.source: nvml")


def _gpus(read: Callable[[], Sequence[GpuReading]]) -> Iterator[Finding]:
    try:
        readings = read()
    except OSError as error:
        what, _, mend = str(error).partition(": ")
        reason, _, mend = mend.partition(": ")
        yield Finding("bad", "GPUs", f"{what}: {reason}" if reason else what, mend or SEE)
        return
    if not readings:
        yield Finding("bad", "GPUs", "NVML sees none", "see `nvidia-smi`; in a container, give it the GPUs (--gpus all)")
    for reading in readings:
        if reading.error:
            yield Finding("bad", f"GPU {reading.index}", reading.error, SEE)
        else:
            yield Finding(
                "ok", f"GPU {reading.index}", f"{reading.name}, {show_bytes(reading.free_bytes)} of {show_bytes(reading.total_bytes)} free"
            )
    hidden = [pid for reading in readings for pid in reading.processes if not Path(f"/proc/{pid}").exists()]
    if hidden:
        yield Finding(
            "warning", "processes",
            f"NVML names {len(hidden)} that can not be seen here: nobody can tell whose memory theirs is, nor which is an engine's",
            "run the daemon in the host's PID namespace (docker: --pid=host)",
        )  # fmt: skip


def _engine(name: str, config: Settings, simulated: bool) -> Iterator[Finding]:
    engine, about = config.engines[name], f"engines.{name}"
    if simulated or engine.kind != "vllm":
        return
    python = Path(engine.python)
    if not os.access(python, os.X_OK):
        gone = "is no program that this user may run" if python.exists() else "is not there"
        yield Finding(
            "bad", about, f"{python} {gone}", f"`sudo make engine`, or set {about}.python to the python of a venv with vLLM and kvcached"
        )
        return
    found = dict(one.rpartition("-")[::2] for one in vllm.version(vllm.EngineVenv(python=python)).split())
    if missing := [package for package in PACKAGES if package not in found]:
        yield Finding(
            "bad", about, f"{python.parent.parent} has no {' and no '.join(missing)}", "`sudo make engine` makes a venv with both"
        )
        return
    seen, pinned = ", ".join(f"{package} {found[package]}" for package in PACKAGES), _pinned()
    if any(found[package] != version for package, version in pinned.items()):
        tried = ", ".join(f"{package} {pinned[package]}" for package in PACKAGES if package in pinned)
        yield Finding("warning", about, f"{seen}: this daemon was tried with {tried}", "`sudo make engine` makes a venv with those")
    else:
        yield Finding("ok", about, seen)


def _pinned() -> Mapping[str, str]:
    """What fits each other, as the package says it. Empty where it is run without being installed."""
    try:
        required = importlib.metadata.requires("gpu-orchestrator") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    pins = (re.match(r"(vllm|kvcached)==([^;\s]+).*extra == .engine", line) for line in required)
    return {pin[1]: pin[2] for pin in pins if pin}


def _models(config: Settings) -> Iterator[Finding]:
    sources = Sources(dict(os.environ))
    wrong = {name: why for name, spec in config.models.items() if (why := sources.problem(spec))}
    for name, why in wrong.items():
        yield Finding("bad", f"models.{name}", why, "see `orchestratord check-config`")
    if not wrong and config.models:
        yield Finding("ok", "models", f"{len(config.models)} in the config files, and what they name is there")


def _shared_memory() -> Iterator[Finding]:
    mend = "docker: --ipc=host, or --shm-size=8g; else mount a tmpfs there"
    if not os.access(SHM, os.W_OK | os.X_OK):
        yield Finding("bad", str(SHM), "this user can not write there, and kvcached's limits are kept in it", mend)
        return
    free = shutil.disk_usage(SHM).free
    state: Literal["ok", "warning"] = "ok" if free >= SHM_BYTES else "warning"
    yield Finding(state, str(SHM), f"{show_bytes(free)} free", "" if state == "ok" else f"tensor parallelism needs more: {mend}")


def _files() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        yield Finding("ok", "open files", f"{'any number' if soft == resource.RLIM_INFINITY else soft} allowed")
    else:
        yield Finding(
            "warning", "open files", f"{soft} allowed, and a stream takes two", f"LimitNOFILE=65536 in its unit, or `ulimit -n {FILES}`"
        )


def _folders(config: Settings) -> Mapping[str, Path]:
    return {"dirs.state": config.state_dir, "dirs.runtime": config.runtime_dir, "logs": config.logs_dir}


def _folder(name: str, folder: Path) -> Iterator[Finding]:
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))  # not each.exists(): that raises where it may not look
    if not os.access(there, os.W_OK | os.X_OK):
        what = f"{there} can not be written by this user"
        yield Finding("bad", name, what, f"make {folder} its own, or choose another one under dirs in the config")
        return
    free = shutil.disk_usage(there).free
    if free >= DISK_LOW_BYTES:
        yield Finding("ok", name, f"{folder}, {show_bytes(free)} free")
    else:
        state: Literal["warning", "bad"] = "bad" if free < DISK_OUT_BYTES else "warning"
        yield Finding(state, name, f"{folder}: {show_bytes(free)} free", "make room there: registrations and logs are refused without")


def _group(config: Settings) -> Iterator[Finding]:
    if config.admin.group is not None:
        try:
            sockets.group(config.admin.group, config.admin.group)
        except StartupError as error:
            what, _, mend = error.message.removeprefix("admin.group: ").partition(": ")
            yield Finding("bad", "admin.group", what, mend)
