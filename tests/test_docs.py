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

from orchestrator import __version__, settings
from orchestrator.cli.exits import MEANINGS
from orchestrator.cli.main import cli as orchestratorctl
from orchestrator.commands import main as orchestratord
from orchestrator.config_errors import load
from orchestrator.policy.instance import State
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.units import parse_duration, parse_size
from orchestrator.reload import LIVE
from orchestrator.settings import Settings
from tests.docs import codes, commands
from tests.docs.__main__ import MADE, current
from tests.docs.pages import PAGES, anchors, blocks, first_cells, links, prose, section

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ERRORS = (ROOT / "docs/errors.md").read_text()
SHOWN = [(page, *each) for page in PAGES for each in sorted(set(commands.shown(page.read_text())))]
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


@pytest.mark.parametrize("page", MADE)
def test_what_is_made_from_the_code_is_current(page: str) -> None:
    assert (ROOT / page).read_text() == current(page), "write it anew: python -m tests.docs"


def test_every_error_code_is_documented_and_no_other() -> None:
    assert set(first_cells(section(ERRORS, "Of the API"))) == codes.of_the_api()


def test_every_code_of_orchestratorctl_is_documented_and_no_other() -> None:
    cells = set(first_cells(section(ERRORS, "Exit codes"))) - commands.PROGRAMS.keys()
    assert cells == codes.of_the_cli()


def test_every_fault_of_a_configuration_is_documented() -> None:
    told = section(ERRORS, "Of the configuration").replace("`", "'")
    assert sorted(fault for fault in codes.of_configuration() if fault.replace("`", "'") not in told) == []


def test_every_state_is_documented() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert [state for state in State if f"`{state}`" not in text] == []


@pytest.mark.parametrize(("name", "group"), [("orchestratorctl", orchestratorctl), ("orchestratord", orchestratord)])
def test_every_verb_is_in_the_readme(name: str, group: Group) -> None:
    assert [verb for verb, command in group.commands.items() if not command.hidden and f"{name} {verb}" not in README] == []


def test_every_exit_code_is_documented_and_no_other() -> None:
    table, _, _ = section(ERRORS, "Exit codes").partition("| `orchestratord` |")
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(MEANINGS)


def test_every_make_target_is_in_the_readme() -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [target for target in targets if target not in ("help",) and f"make {target}" not in README] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        target, _, anchor = link.partition("#")
        there = page.parent / target if target else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_whole(page: Path) -> None:
    for lines in re.findall(r"(?:^\|.*\n)+", prose(page.read_text()), re.MULTILINE):
        head, *rows = (line.replace("\\|", "").count("|") for line in lines.splitlines())
        assert set(rows) == {head}, lines.splitlines()[0]


SETTINGS_SHOWN = [
    (page.name, "\n".join(block.lines))
    for page in PAGES
    for block in blocks(page.read_text())
    if block.kind == "yaml" and set(yaml.safe_load("\n".join(block.lines))) <= set(Settings.model_fields)
]


@pytest.mark.parametrize(("page", "text"), SETTINGS_SHOWN, ids=[page for page, _ in SETTINGS_SHOWN])
def test_settings_that_are_shown_are_correct(page: str, text: str, tmp_path: Path) -> None:
    (tmp_path / page).write_text(text)
    load([tmp_path / page], {})


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/README.md"
    told = {(index.parent / link.partition("#")[0]).resolve() for link in links(index.read_text())}
    assert sorted(str(page) for page in PAGES if page.is_relative_to(index.parent) and page not in told | {index}) == []


@pytest.mark.parametrize(("page", "command", "whole"), SHOWN, ids=[f"{page.name}: {command}" for page, command, _ in SHOWN])
def test_commands_that_are_shown_are_taken(page: Path, command: str, whole: bool) -> None:
    assert commands.fault(command, whole) is None


def test_a_page_with_a_wrong_command_would_be_found() -> None:
    page = "`orchestratorctl lod small`, `orchestratorctl ls --whatch`\n\n```console\n$ sudo orchestratorctl describe | less\n```\n"
    said = {commands.fault(command, whole) for command, whole in commands.shown(page)}
    assert said == {"orchestratorctl has no verb 'lod'", "No such option '--whatch'. Did you mean '--watch'?", "Missing argument 'NAME'."}


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
