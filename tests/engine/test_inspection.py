"""Where a model's class is looked at, with a stand-in for vLLM's registry. In a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from orchestrator.drivers.vllm import SERVE

REGISTRY = """
    def _run_in_subprocess(look):
        return ["a new python", None]
"""
USE = """
    import inspection, json, os, sys
    inspection.install()
    from vllm.model_executor.models import registry
    me, looked = os.getpid(), []
    def look():
        looked.append(1)
        if sys.argv[1] == "fails":
            raise ImportError("no such model")
        if sys.argv[1] == "dies":
            os.abort()
        return ["a fork" if os.getppid() == me else "here", "x" * 100_000]
    print(json.dumps([registry._run_in_subprocess(look)[0], len(looked)]))
"""


@pytest.mark.parametrize(("look", "where"), [("works", "a fork"), ("fails", "a new python"), ("dies", "a new python")])
def test_a_class_is_looked_at_in_a_fork_and_where_that_fails_as_vllm_does_it(tmp_path: Path, look: str, where: str) -> None:
    home = tmp_path / "vllm/model_executor/models"
    home.mkdir(parents=True)
    for folder in (home, home.parent, home.parent.parent):
        (folder / "__init__.py").touch()
    (home / "registry.py").write_text(textwrap.dedent(REGISTRY))
    places = os.pathsep.join([str(tmp_path), str(SERVE.parent)])
    command = [sys.executable, "-c", textwrap.dedent(USE), look]
    done = subprocess.run(command, env={"PYTHONPATH": places}, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [where, 0]  # never in the process itself
