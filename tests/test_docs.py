"""The docs say what is true: settings, model fields, error codes, verbs, targets and the service unit are held to the code."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Group

from orchestrator import __version__, errors, settings
from orchestrator.cli.exits import MEANINGS
from orchestrator.cli.main import cli as orchestratorctl
from orchestrator.commands import main as orchestratord
from orchestrator.config_errors import load
from orchestrator.policy.instance import State
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.units import parse_duration, parse_size
from orchestrator.reload import LIVE
from orchestrator.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs/api.md").read_text()
CONFIG = ROOT / "config/orchestrator.yaml"


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def test_the_shipped_config_has_every_setting_with_its_default() -> None:
    shipped = dict(leaves(yaml.safe_load(CONFIG.read_text())))
    defaults = dict(leaves(Settings().model_dump(mode="python")))
    assert shipped.keys() == defaults.keys()
    for path, default in defaults.items():
        written = shipped[path]
        if isinstance(default, float) and isinstance(written, str):
            written = parse_duration(written)
        elif isinstance(default, int) and isinstance(written, str):
            written = parse_size(written)
        elif isinstance(default, (Path, tuple)):
            written = type(default)(written)
        assert written == default, ".".join(path)


def test_every_line_of_the_shipped_config_says_why() -> None:
    for line in CONFIG.read_text().splitlines():
        if re.match(r"  +\w+:", line) and not line.rstrip().endswith(":"):
            assert "#" in line or "null" in line or line.strip().startswith(("python:", "kind:")), f"no word on: {line.strip()}"


@pytest.mark.parametrize("files", [["orchestrator.yaml"], ["orchestrator.yaml", "models.yaml"], ["demo.yaml"]])
def test_shipped_configs_are_correct(files: list[str]) -> None:
    load([ROOT / "config" / name for name in files], {})


def test_the_example_models_show_every_field() -> None:
    text = (ROOT / "config/models.yaml").read_text()
    assert [field for field in ModelSpec.model_fields if field != "name" and f"{field}:" not in text] == []


def test_the_committed_schema_is_current() -> None:
    assert json.loads((ROOT / "config/orchestrator.schema.json").read_text()) == settings.schema()


def test_every_error_code_is_documented() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.OrchestratorError)]
    codes = {str(c.code) for c in classes if c.code}
    for path in (ROOT / "orchestrator").rglob("*.py"):
        codes |= set(re.findall(r'code="(\w+)"', path.read_text())) if "cli" not in path.parts and "simulator" not in path.parts else set()
    assert sorted(code for code in codes if f"`{code}`" not in API) == []


def test_every_state_is_documented() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert [state for state in State if f"`{state}`" not in text] == []


@pytest.mark.parametrize(("name", "group"), [("orchestratorctl", orchestratorctl), ("orchestratord", orchestratord)])
def test_every_verb_is_in_the_readme(name: str, group: Group) -> None:
    assert [verb for verb, command in group.commands.items() if not command.hidden and f"{name} {verb}" not in README] == []


def test_every_exit_code_is_documented() -> None:
    assert [code for code in MEANINGS if f"| {code} |" not in API] == []


def test_every_make_target_is_in_the_readme() -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [target for target in targets if target not in ("help",) and f"make {target}" not in README] == []


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_changelog_begins_with_this_version() -> None:
    found = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == __version__


def test_what_a_reload_changes_at_once_is_documented_and_is_a_setting() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    settings_there = {".".join(path) for path, _ in leaves(Settings().model_dump())}
    assert sorted(LIVE - settings_there) == []
    assert sorted(name for name in LIVE if f"`{name}`" not in text) == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_accepts_the_unit_without_a_word() -> None:
    """Its exit code is 0 for directives that it ignores, so what counts is that it says nothing."""
    done = subprocess.run(
        ["systemd-analyze", "verify", str(ROOT / "systemd/orchestrator.service")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_the_units_exposure_is_as_documented() -> None:
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(ROOT / "systemd/orchestrator.service")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for orchestrator.service: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert f"gives the unit {found[1]} " in (ROOT / "docs/operations.md").read_text()


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not here")
def test_systemd_accepts_the_user_and_the_folders(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for program, name in (("systemd-sysusers", "sysusers"), ("systemd-tmpfiles", "tmpfiles")):
        words = [
            program,
            f"--root={tmp_path}",
            *(["--create"] if name == "tmpfiles" else []),
            str(ROOT / f"systemd/orchestrator.{name}.conf"),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "ignoring" not in done.stderr.lower()
    assert "orchestrator:" in (tmp_path / "etc/passwd").read_text()
    assert (tmp_path / "etc/orchestrator").stat().st_mode & 0o777 == 0o750
