"""`make install` into a folder, twice, and `make uninstall`: what is there after each. The program is a stand-in: two words."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_IN = {
    "stand_in.py": "def main() -> None:\n    print('here')\n",
    "stand_in-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: stand-in\nVersion: 1\n",
    "stand_in-1.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "stand_in-1.dist-info/entry_points.txt": "[console_scripts]\norchestratord = stand_in:main\norchestratorctl = stand_in:main\n",
}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "stand_in-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        for name, text in STAND_IN.items():
            made.writestr(name, text)
        made.writestr("stand_in-1.dist-info/RECORD", "".join(f"{name},,\n" for name in [*STAND_IN, "stand_in-1.dist-info/RECORD"]))
    return path


def make(target: str, root: Path, wheel: Path, prefix: str = "/opt/orchestrator") -> "subprocess.CompletedProcess[str]":
    words = ["make", "-s", "-C", str(ROOT), target, f"DESTDIR={root}", f"PREFIX={prefix}", f"PYTHON={sys.executable}"]
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PACKAGE": str(wheel), "PIP_ARGS": "--no-index", "HOME": str(wheel.parent)}
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=110)


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or path.is_symlink()}


def test_twice_installed_and_uninstalled_leaves_config_and_state_alone(tmp_path: Path, wheel: Path) -> None:
    root = tmp_path / "root"
    done = make("install", root, wheel)
    assert done.returncode == 0, done.stderr
    config, unit = root / "etc/orchestrator/orchestrator.yaml", root / "etc/systemd/system/orchestrator.service"
    first = files(root)
    assert {"usr/lib/sysusers.d/orchestrator.conf", "usr/lib/tmpfiles.d/orchestrator.conf"} <= first
    assert unit.read_text() == (ROOT / "systemd/orchestrator.service").read_text()
    for name in ("orchestratord", "orchestratorctl"):
        assert (root / "opt/orchestrator/bin" / name).read_text().startswith("#!/opt/orchestrator/bin/python")
        assert str((root / "usr/local/bin" / name).readlink()) == f"/opt/orchestrator/bin/{name}"
    assert (config.stat().st_mode & 0o777, str(tmp_path) in config.read_text()) == (0o640, False)

    config.write_text("listen: {port: 9}\n")
    (root / "opt/orchestrator/engine").mkdir()
    assert make("install", root, wheel).returncode == 0
    assert files(root) == first
    assert config.read_text() == "listen: {port: 9}\n"

    state = root / "var/lib/orchestrator/state.db"
    state.parent.mkdir(parents=True)
    state.write_text("mine")
    for _ in range(2):
        done = make("uninstall", root, wheel)
        assert done.returncode == 0, done.stderr
        assert "left as they are" in done.stdout
        assert files(root) == {"etc/orchestrator/orchestrator.yaml", "var/lib/orchestrator/state.db"}
        assert not (root / "opt/orchestrator").exists()


def test_another_prefix_is_in_the_unit_and_the_config(tmp_path: Path, wheel: Path) -> None:
    root = tmp_path / "root"
    assert make("install", root, wheel, "/srv/orch").returncode == 0
    for path in ("etc/systemd/system/orchestrator.service", "etc/orchestrator/orchestrator.yaml"):
        text = (root / path).read_text()
        assert ("/srv/orch" in text, "/opt/orchestrator" in text) == (True, False)


def test_a_folder_that_holds_something_else_is_neither_installed_into_nor_removed(tmp_path: Path, wheel: Path) -> None:
    root = tmp_path / "root"
    theirs = root / "usr/bin/theirs"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    done = make("install", root, wheel, "/usr")
    assert done.returncode != 0
    assert "is there and is none of ours: choose another PREFIX" in done.stderr
    assert make("uninstall", root, wheel, "/usr").returncode == 0
    assert files(root) == {"usr/bin/theirs"}
