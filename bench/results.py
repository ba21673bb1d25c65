"""bench/results/NAME.json: what was measured, where, when, with which command. Only what a run produced is written."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.experiments.figures import percentile as percentile

RESULTS = Path(__file__).parent / "results"


def machine(gpus: str) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cores": os.cpu_count(), "memory_gib": round(memory / 2**30), "kernel": platform.release(), "gpus": gpus}


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(
    name: str,
    command: str,
    figures: Mapping[str, float],
    notes: Mapping[str, Any],
    gpus: str,
    packages: tuple[str, ...] = (),
    folder: Path = RESULTS,
) -> Path:
    """Returns the file. `figures`: numbers only; `notes`: whatever explains them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "machine": machine(gpus),
        "versions": versions("uvicorn", "fastapi", "openai", *packages),
        "figures": dict(figures),
        "notes": dict(notes),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def verdict(figures: Mapping[str, float], passed: Mapping[str, bool], path: Path) -> int:
    """Printed: the figures, what was reached and what not, the file. Returns the exit code."""
    for key, value in figures.items():
        print(f"{key:32} {value:14.3f}")
    for text, ok in passed.items():
        print(f"{'ok    ' if ok else 'FAILED'} {text}")
    print(path)
    return 0 if all(passed.values()) else 1


def typed(name: str, argv: Sequence[str]) -> str:
    """The command that somebody else would type: without where this run put its results."""
    kept = [word for at, word in enumerate(argv) if word != "--out" and (at == 0 or argv[at - 1] != "--out")]
    return " ".join(["python -m bench", name, *kept])


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    return done.stdout.strip() or None
