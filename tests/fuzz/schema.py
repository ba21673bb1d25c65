"""Schemathesis against /openapi.json of the running daemon: requests that are as the document says, and such that are not.

What an engine takes is its own to say, so neither `negative_data_rejection` nor `positive_data_acceptance` is asked for; that a body
without a model is refused is (hooks.py).
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.ground import Ground

ROOT = Path(__file__).parents[2]
SLOW_S = 20  # an answer that takes longer is a hang


def run(at: Ground, seed: int, examples: int, max_time_s: int | None = None) -> tuple[int, str]:
    """How many cases, and what was wrong: "" where nothing was."""
    with tempfile.TemporaryDirectory() as folder:  # it keeps failures beside where it runs
        words = ["run", f"{at.url}/openapi.json", f"--seed={seed}", f"--max-examples={examples}", "--workers=2", "--continue-on-failure"]
        words += ["--exclude-checks=negative_data_rejection,positive_data_acceptance", f"--request-timeout={SLOW_S}", "--no-shrink"]
        words += ["--warnings=off", *([f"--max-time={max_time_s}"] if max_time_s else [])]
        env = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "FUZZ_MODEL": at.model, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
        command = [str(Path(sys.executable).with_name("schemathesis")), *words]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    found = re.search(r"(\d+) generated", said)
    return int(found[1]) if found else 0, "" if done.returncode == 0 and found else said
