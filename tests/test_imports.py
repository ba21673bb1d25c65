"""Who may import whom, as drawn in orchestrator/__init__.py. A new arrow is a decision: change it here and there, with a reason."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "orchestrator"

# part -> parts of ours that it may import (itself is always allowed)
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "policy": {"errors"},
    "control": {"policy", "errors"},
    "drivers": {"policy", "errors"},
    "api": {"control", "policy", "errors"},
    "settings": {"policy"},
    "marked_yaml": {"errors"},
    "config_errors": {"settings", "marked_yaml", "errors"},
    "journal": set(),
    "garbage": set(),
    "logs": {"journal"},
    "engine": set(),
    # measures from outside, as a client of the daemon would, and starts a plain vLLM with what the drivers know of it
    "experiments": {"drivers", "engine", "policy"},
    "cli": {"experiments", "marked_yaml", "errors"},
    "front": {"api", "control", "drivers", "errors"},
    "ending": {"drivers", "errors"},
    "reload": {"api", "control", "drivers", "policy", "settings", "config_errors", "errors"},
    "doctor": {"drivers", "policy", "settings", "errors"},
    "premises": {"control", "drivers", "policy", "settings", "errors"},
    "daemon": {
        "premises",
        "garbage",
        "doctor",
        "front",
        "ending",
        "reload",
        "commands",
        "api",
        "control",
        "drivers",
        "policy",
        "settings",
        "errors",
        "logs",
    },
    "commands": {"daemon", "doctor", "drivers", "policy", "settings", "config_errors", "errors", "logs"},
}
# third party (or telling standard) module -> the only files that may import it
HOMES: dict[str, set[str]] = {
    "pynvml": {"drivers/nvml_reader.py"},
    "fcntl": {"drivers/kvcached.py", "premises.py", "engine/"},
    "mmap": {"drivers/kvcached.py", "engine/"},
    "sqlite3": {"drivers/store.py", "drivers/store_file.py"},
    "psutil": {"drivers/processes.py"},
    "subprocess": {"drivers/processes.py"},
    "httptools": {"api/upstream.py"},
    "httpx2": {"drivers/vllm.py", "drivers/launcher.py", "drivers/upkeep.py", "drivers/pulse.py"},
    "fastapi": {"api/"},
    "starlette": {"api/", "engine/"},
    "uvicorn": {"api/server.py", "api/connection.py", "api/websocket.py", "engine/"},
    "websockets": {"api/realtime.py"},
    "yaml": {"marked_yaml.py", "cli/screen.py"},
    "pydantic": {
        "policy/",
        "control/registry.py",
        "settings.py",
        "config_errors.py",
        "api/admin.py",
        "api/desired.py",
        "api/keys.py",
        "drivers/store.py",
    },
    "pydantic_settings": {"settings.py", "config_errors.py"},
    "prometheus_client": {"api/metrics.py"},
    "opentelemetry": {"api/traces.py"},
    "click": {"commands.py", "cli/"},
    "rich": {"cli/"},
    "matplotlib": {"experiments/plots.py"},
    "huggingface_hub": {"engine/pull.py"},
    "vllm": {"engine/vllm/"},
    "kvcached": {"engine/vllm/"},
    "torch": {"engine/vllm/"},
}
PURE = {"time", "os", "asyncio", "logging", "subprocess", "socket", "threading", "random", "pathlib", "io"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, also inside functions."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module or "") if part)
            yield from ([f"{name}.{alias.name}" for alias in node.names] if name == "orchestrator" else [name])


def part_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    if part == "__init__":
        assert not [name for name in imports(path) if name.startswith("orchestrator")]
        return
    ours = {part_of(name) for name in imports(path) if name.startswith("orchestrator.")} - {part, "", "__version__"}
    assert ours <= ALLOWED[part], f"{relative} may not import {', '.join(sorted(ours - ALLOWED[part]))}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_parties_stay_in_their_file(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or any(relative == home or (home.endswith("/") and relative.startswith(home)) for home in homes), (
            f"{relative} may not import {name}: its home is {', '.join(sorted(homes or ()))}"
        )


@pytest.mark.parametrize("path", sorted((PACKAGE / "policy").glob("*.py")), ids=lambda p: p.name)
def test_policy_is_pure(path: Path) -> None:
    touched = {name.split(".")[0] for name in imports(path)} & PURE
    assert not touched, f"policy/{path.name} decides from data only; it may not import {', '.join(sorted(touched))}"


def test_the_simulated_engine_and_the_code_inside_vllm_do_not_import_each_other() -> None:
    for path in (PACKAGE / "engine").rglob("*.py"):
        home = path.relative_to(PACKAGE / "engine").parts[0]
        assert not [name for name in imports(path) if name.startswith("orchestrator.engine.") and part_of(name) and home not in name]


def test_the_daemon_loads_no_engine_library_and_no_extra() -> None:
    never = ("vllm", "torch", "kvcached", "pynvml", "opentelemetry.sdk")
    code = f"import sys, orchestrator.daemon; print([m for m in {never} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_no_drawers() -> None:
    """A file is named for what it holds."""
    drawers = {"utils", "helpers", "manager", "common", "misc", "util", "base"}
    found = [str(path.relative_to(ROOT)) for path in MODULES if drawers & set(path.stem.split("_"))]
    assert not found
