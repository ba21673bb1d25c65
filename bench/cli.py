"""cli: how long `orchestratorctl ls` takes, as a person would feel it: the whole process, against a daemon with 20 and with 200 models.

In turns with `python -c pass` in the same run, so that a slow machine is seen as one: the ratio says how much of it is ours, so does the
CPU time, which others on the machine hardly change. The models are registered and stopped.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import results
from bench.box import Box
from bench.demo import QWEN, SHAPES
from bench.folders import of_shape
from orchestrator.cli.client import Client
from orchestrator.cli.target import Target

FEW, MANY = 20, 200
RUNS = 60
WARM = 5  # files come from the page cache, as they do for whoever uses it twice
GOAL_MS = 150.0


class Run(NamedTuple):
    wall_ms: float
    cpu_ms: float


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench cli", description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS, help="of each command")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="orch-models-") as folder:
        source = of_shape(Path(folder) / "qwen-0.5b", QWEN | SHAPES["qwen-0.5b"])
        with Box({"ORCH_GPUS__SOURCE": "simulated"}, sampled=False) as box:
            _register(box.socket, source, range(FEW))
            took = _timed(_commands(box.socket), options.runs)
            _register(box.socket, source, range(FEW, MANY))
            took["ls_200"] = _timed({"ls_200": _commands(box.socket)["ls"]}, options.runs)["ls_200"]
    figures = {f"{name}_ms": results.percentile([one.wall_ms for one in runs], 0.5) for name, runs in took.items()}
    figures |= {f"{name}_p95_ms": results.percentile([one.wall_ms for one in runs], 0.95) for name, runs in took.items()}
    figures |= {f"{name}_cpu_ms": results.percentile([one.cpu_ms for one in runs], 0.5) for name, runs in took.items()}
    figures |= {"ls_over_python": figures["ls_ms"] / figures["python_ms"], "runs": options.runs, "load_1m": os.getloadavg()[0]}
    passed = {
        f"ls of {FEW} models within {GOAL_MS:g} ms": figures["ls_ms"] <= GOAL_MS,
        f"ls of {MANY} models within {GOAL_MS:g} ms": figures["ls_200_ms"] <= GOAL_MS,
    }
    notes = {"passed": passed, "ls": f"{FEW} models, stopped", "ls_200": f"{MANY} models, stopped", "python": "python -c pass"}
    path = results.write("cli", results.typed("cli", argv), figures, notes, "simulated", ("click",), folder=options.out)
    return results.verdict(figures, passed, path)


def _register(socket: Path, source: Path, numbers: Sequence[int]) -> None:
    client = Client(Target(str(socket), socket=str(socket)))
    for number in numbers:
        client.send("POST", "/models?start=false", {"name": f"org/model-{number:03}", "source": str(source)})


def _commands(socket: Path) -> dict[str, list[str]]:
    ctl = [str(Path(sys.executable).with_name("orchestratorctl")), "--host", str(socket)]
    return {"python": [sys.executable, "-c", "pass"], "ls": [*ctl, "ls"], "help": [*ctl, "--help"], "top": [*ctl, "top", "--once"]}


def _timed(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[Run]]:
    """Each run of each command, in turns. Raises CalledProcessError where one fails."""
    took: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(-WARM, runs):
        for name, words in commands.items():
            before, began = _children_s(), time.perf_counter()
            subprocess.run(words, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": ""}, check=True)
            if number >= 0:
                took[name].append(Run(1000 * (time.perf_counter() - began), 1000 * (_children_s() - before)))
    return took


def _children_s() -> float:
    """CPU of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
