"""doctor: each thing that may be wrong with a machine is found, with a mend; and a machine where nothing is says so."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator import doctor
from orchestrator.commands import main
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import GIB, MIB
from orchestrator.settings import Settings

CARD = GpuReading("GPU-0", 0, "NVIDIA H200", 140 * GIB, 139 * GIB, {os.getpid(): GIB})


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: the runtime folder holds unix sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-doc-") as path:
        yield Path(path)


@pytest.fixture
def box(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine as it should be: room, files, an engine venv with what was tried."""
    site = folder / "engine/lib/python3.12/site-packages"
    site.mkdir(parents=True)
    for package, version in doctor._pinned().items():
        (site / f"{package}-{version}.dist-info").mkdir()
    (folder / "engine/bin").mkdir()
    (folder / "engine/bin/python").symlink_to(sys.executable)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1 << 16, 1 << 16))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * GIB))
    monkeypatch.setattr(doctor, "SHM", folder)
    return folder


def config(box: Path, **more: Any) -> Settings:
    return Settings.model_validate(
        {
            "dirs": {"state": str(box / "state"), "runtime": str(box / "run")},
            "engines": {"default": {"python": str(box / "engine/bin/python")}},
            **more,
        }
    )


def found(settings: Settings, readings: Sequence[GpuReading] = (CARD,), simulated: bool = False) -> dict[str, tuple[str, str, str]]:
    """By what they are about; each that is not ok has a mend, and no other has."""
    findings = doctor.examine(settings, lambda: readings, simulated)
    for one in findings:
        assert (one.state == "ok") == (one.mend == ""), one
    return {one.about: (one.state, one.what, one.mend) for one in findings}


def test_where_nothing_is_wrong_everything_is_ok(box: Path) -> None:
    seen = found(config(box))
    assert {state for state, _, _ in seen.values()} == {"ok"}
    assert set(seen) == {"GPU 0", "engines.default", str(box), "open files", "dirs.state", "dirs.runtime", "logs"}
    assert seen["GPU 0"][1] == "NVIDIA H200, 139.0GiB of 140.0GiB free"


@pytest.mark.parametrize(
    ("error", "what", "mend"),
    [
        ("NVML: Driver Not Loaded: load it with `nvidia-modprobe`", "NVML: Driver Not Loaded", "load it with `nvidia-modprobe`"),
        ("NVML: it did not answer", "NVML: it did not answer", "see `nvidia-smi` and `dmesg`"),
    ],
)
def test_why_nvml_does_not_answer(box: Path, error: str, what: str, mend: str) -> None:
    def read() -> Sequence[GpuReading]:
        raise OSError(error)

    (first, *_) = doctor.examine(config(box), read, False)
    assert (first.state, first.what, first.mend) == ("bad", what, mend)


def test_cards_that_are_lost_hidden_or_not_there(box: Path) -> None:
    lost = GpuReading("GPU-1", 1, "Card", GIB, GIB, {}, error="NVML: GPU is lost")
    assert found(config(box), [CARD, lost])["GPU 1"][:2] == ("bad", "NVML: GPU is lost")
    assert found(config(box), [])["GPUs"][0] == "bad"
    strangers = GpuReading("GPU-0", 0, "Card", GIB, GIB, {2**22 - 1: MIB})
    state, what, mend = found(config(box), [strangers])["processes"]
    assert (state, "--pid=host" in mend) == ("warning", True)
    assert what.startswith("NVML names 1 ")
    assert found(config(box), simulated=True)["GPUs"][0] == "warning"


def test_engine_venvs_that_are_not_there_lack_something_or_do_not_fit(box: Path) -> None:
    site, pins = box / "engine/lib/python3.12/site-packages", doctor._pinned()
    vllm, kvcached = pins["vllm"], pins["kvcached"]
    shutil.move(site / f"vllm-{vllm}.dist-info", site / "vllm-0.1.0.dist-info")
    state, what, _ = found(config(box))["engines.default"]
    assert (state, what) == ("warning", f"vllm 0.1.0, kvcached {kvcached}: this daemon was tried with vllm {vllm}, kvcached {kvcached}")
    shutil.rmtree(site / f"kvcached-{kvcached}.dist-info")
    assert found(config(box))["engines.default"][:2] == ("bad", f"{box}/engine has no kvcached")
    (box / "engine/bin/python").unlink()
    assert found(config(box))["engines.default"][:2] == ("bad", f"{box}/engine/bin/python is not there")
    (box / "engine/bin/python").touch()
    assert "no program" in found(config(box))["engines.default"][1]
    assert "engines.default" not in found(config(box), simulated=True)


def test_a_model_whose_folder_is_not_there(box: Path) -> None:
    assert found(config(box, models={"a": {"source": "/nowhere/a"}}))["models.a"][0] == "bad"


def test_little_room_few_files_and_no_group(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 1 << 16))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500 * MIB))
    seen = found(config(box, admin={"group": "no-such-group"}))
    wrong = {name: state for name, (state, _, _) in seen.items() if state != "ok"}
    assert wrong == {**dict.fromkeys([str(box), "open files", "dirs.state", "dirs.runtime", "logs"], "warning"), "admin.group": "bad"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=MIB))
    assert found(config(box))["dirs.state"][0] == "bad"
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert found(config(box))["open files"][1] == "any number allowed"


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which root alone may")
def test_folders_that_are_another_users(box: Path) -> None:
    for above in (box, *box.parents):
        if not above.stat().st_mode & 0o001:
            above.chmod(0o755)
    (box / "state").mkdir(mode=0o700)
    become = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    program = f"import os; from orchestrator.commands import main; {become}; main(['doctor', '--json'])"
    environ = {
        "ORCH_DIRS__STATE": str(box / "state"),
        "ORCH_DIRS__RUNTIME": "/tmp/none",
        "ORCH_GPUS__SOURCE": "simulated",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    seen: Mapping[str, Any] = {one["about"]: one for one in json.loads(said.stdout)["findings"]}
    assert (seen["dirs.state"]["state"], seen["dirs.runtime"]["state"], said.returncode) == ("bad", "ok", 1)


def test_the_command_says_each_with_its_mend_and_its_code_is_1_where_one_is_bad(box: Path) -> None:
    environ = {"ORCH_DIRS__STATE": str(box / "state"), "ORCH_DIRS__RUNTIME": str(box / "run"), "ORCH_GPUS__SOURCE": "simulated"}
    said = CliRunner().invoke(main, ["doctor"], env=environ)
    assert said.exit_code == 0
    assert (
        "warning  GPUs: they are simulated, and so are engines and answers\n         -> on a box with GPUs: gpus.source: nvml\n"
        in said.stdout
    )
    bad = CliRunner().invoke(main, ["doctor", "--json"], env={**environ, "ORCH_ADMIN__GROUP": "no-such-group"})
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["findings"][-1]["mend"] == "`sudo groupadd no-such-group` makes it, or name another one"
