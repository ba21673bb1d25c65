"""What the GPU benches of several parts have alike: their command line, what is wrong with it, and what a simulated run has instead."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.box import SIMULATED_CARD
from bench.demo import QWEN
from bench.folders import of_shape


def parser(name: str, about: str | None, parts: Collection[str], limit_s: float, models: str) -> argparse.ArgumentParser:
    """`models`: what its --model options are for."""
    made = argparse.ArgumentParser(prog=f"python -m bench {name}", description=about)
    made.add_argument("--engine-python", type=Path, help="python of the engine venv; not needed with --simulated")
    made.add_argument("--model", nargs=2, action="append", metavar=("NAME", "FOLDER"), help=models)
    made.add_argument("--out", type=Path, help="folder for the results (default: bench/results)")
    made.add_argument("--parts", default=",".join(parts), help="which, in this order (default: %(default)s)")
    made.add_argument("--limit-s", type=float, default=limit_s, help="the whole run; parts that no longer fit are left out")
    made.add_argument("--simulated", action="store_true", help="on a simulated GPU: tries the code, measures nothing")
    return made


def parsed(
    made: argparse.ArgumentParser, argv: Sequence[str], parts: Collection[str], models: int | None, wanted: str
) -> argparse.Namespace:
    """`models`: how many it needs; None: one or more. `wanted`: what is said where they, or the engine's python, are missing."""
    options = made.parse_args(argv)
    options.engine_env = {"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    options.parts = [part for part in options.parts.split(",") if part]
    if unknown := [part for part in options.parts if part not in parts]:
        made.error(f"--parts: {', '.join(unknown)} is not one of {', '.join(parts)}")
    if options.simulated and options.out and options.out.resolve() == results.RESULTS:
        made.error("--out: results of a simulated run are not kept in bench/results")
    if not options.simulated:
        given = len(options.model or ())
        if options.engine_python is None or given == 0 or (models is not None and given != models):
            made.error(wanted)
        if not options.engine_python.exists():
            made.error(f"--engine-python: there is no {options.engine_python}")
    return options


@contextlib.contextmanager
def placed(options: argparse.Namespace, name: str, shapes: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """A folder for the run, gone after it; `options.out` is there then. A simulated run gets models of `shapes`."""
    with tempfile.TemporaryDirectory(prefix="orch-models-") as folder:
        if options.simulated:
            options.model = [(model, str(of_shape(Path(folder) / model, {**QWEN, **shape}))) for model, shape in shapes.items()]
            options.out = options.out or Path(tempfile.mkdtemp(prefix=f"orch-{name}-"))
            print("SIMULATED: this exercises the code of the measurement. Its figures say nothing, and are not kept in bench/results.\n")
        options.out = options.out or results.RESULTS
        options.out.mkdir(parents=True, exist_ok=True)
        yield Path(folder)


def settings(options: argparse.Namespace, args: Sequence[str], step_s: float, load_s: float = 0.5, **engine: object) -> dict[str, str]:
    """The daemon's: the card, and one venv whose engines all have vLLM's `args`; `engine`: more of that venv. `step_s`, `load_s`: of
    simulated engines."""
    if options.simulated:
        engine |= {"kind": "simulated", "env": {"SIM_LOAD_S": str(load_s), "SIM_STEP_S": str(step_s)}}
    else:
        engine |= {"python": str(options.engine_python), "env": options.engine_env}
    card = SIMULATED_CARD if options.simulated else {"ORCH_GPUS__SOURCE": "nvml"}
    return {**card, "ORCH_ENGINES": json.dumps({"default": {**engine, "args": list(args)}})}
