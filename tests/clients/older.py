"""Clients of other versions than those of this venv, in a folder of their own, and the tests of this folder run against them.

The folder is filled once by pip (half a minute) and kept in the venv. It comes first on the path of a pytest of its own: the very same
tests run, and what else they need they find here.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE / "older.txt"
INSTALL_S, RUN_S = 420, 300


def folder() -> Path:
    """Skips the test where it is not there and pip cannot fill it."""
    there = Path(sys.prefix) / "clients" / hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    if there.exists():
        return there
    if "CI" in os.environ:
        pytest.skip("300 MiB of other versions are not downloaded for each run of CI: `make test` fills the folder once")
    there.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=there.parent) as made:
        into = Path(made) / "all"
        words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--ignore-installed", "--target", str(into), "-r"]
        done = subprocess.run([sys.executable, *words, str(REQUIREMENTS)], capture_output=True, text=True, timeout=INSTALL_S, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            pytest.skip(f"pip found no {REQUIREMENTS.name} (no package index?): {said[-1] if said else done.returncode}")
        with contextlib.suppress(OSError):  # another worker of this run was first: its own is as good
            into.rename(there)  # whole, or not there
    return there


def outcomes(files: Iterable[str]) -> Mapping[str, str]:
    """`file::test` -> "" where it passed, with all of its parameters, else what it said."""
    with tempfile.TemporaryDirectory() as made:
        report = Path(made) / "report.xml"
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
        words = ["-m", "pytest", "-p", "no:cacheprovider", "-n", "0", f"--junitxml={report}", *(str(HERE / file) for file in files)]
        done = subprocess.run(
            [sys.executable, *words],
            env={**env, "PYTHONPATH": f"{folder()}:{ROOT}", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
            cwd=ROOT,
        )
        assert report.exists(), done.stdout + done.stderr
        found: dict[str, str] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.get("classname", "").rpartition(".")[2]
            name = f"{file}.py::{case.get('name', '').partition('[')[0]}"
            said = [f"{one.tag}: {one.text or one.get('message')}" for one in case if one.tag in ("failure", "error", "skipped")]
            found[name] = found.get(name, "") + "".join(said)
        return found
