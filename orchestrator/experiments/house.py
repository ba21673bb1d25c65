"""The running daemon as an experiment sees it: its models are brought up, unloaded, and left as they were found.

Knows the admin API as a Protocol: whoever runs an experiment hands in a client, and that client's errors pass through unchanged.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import quote

from orchestrator.drivers.vllm import EngineVenv
from orchestrator.experiments import answers, beforehand
from orchestrator.experiments.answers import Endpoint
from orchestrator.experiments.asker import Asker
from orchestrator.experiments.static_engine import Recipe
from orchestrator.experiments.trouble import Trouble
from orchestrator.experiments.watch import Cards, Watch, cards, restarted
from orchestrator.policy.footprint import parse_tokens
from orchestrator.policy.model import flag_in
from orchestrator.policy.units import MIB, parse_size, show_bytes

POLL_S = 0.2
LOAD_S = 900.0
UNLOAD_S = 120.0
COLD_S = 60.0  # where nobody knows yet how long a start takes
GONE = ("stopped", "failed", "removed")
EMPTY_BYTES = 64 * MIB
Json = dict[str, Any]


class Api(Protocol):
    """Raises its own errors where the daemon does not answer, or refuses."""

    def get(self, path: str) -> Json: ...

    def send(self, method: str, path: str, body: Json | None = None) -> Json: ...


class House:
    """`names`: the models of the experiment. Raises Trouble where they can not be measured here; nothing is changed by that."""

    def __init__(self, api: Api, names: Sequence[str], key: str | None, engine_python: Path | None, tolerated: str) -> None:
        self._api, self.names, self._engine_python, self._tolerated = api, list(names), engine_python, _size(tolerated)
        self.status = api.get("/status")
        self.endpoint = Endpoint(url=str(self.status["listen"]), key=key)
        self.before = self.models()
        beforehand.check_names(self)
        if self.simulated:
            os.environ["SIM_GPU_DIR"] = str(self._simulated_folder)  # a static engine inherits it
        self.gpus = beforehand.gpus_of(self)
        self.asker = Asker()
        self._placed: dict[str, list[str]] = {}  # the GPUs that the daemon has chosen for each
        self.cards = self._cards()
        self.readings = {one.uuid: one for one in self.cards.read()}
        if missing := [gpu["uuid"] for gpu in self.gpus if gpu["uuid"] not in self.readings]:
            raise Trouble(f"{missing[0]} is not in this machine: run it where the daemon runs")

    def __enter__(self) -> Self:
        self.asker.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.asker.__exit__(kind, error, trace)
        self.cards.close()

    def check_daemon(self) -> None:
        """Raises Trouble where it is another one than it was; the client's own error where none answers."""
        if (pid := self._api.get("/status")["pid"]) != self.status["pid"]:
            raise Trouble(restarted(int(self.status["pid"]), int(pid)))

    # ---- what there is ----------------------------------------------------------------------------------------------

    @property
    def simulated(self) -> bool:
        return str(self.status["gpu_source"]) == "simulated"

    @property
    def total_bytes(self) -> int:
        return sum(int(gpu["total_bytes"]) for gpu in self.gpus)

    @property
    def used_bytes(self) -> int:
        """Now, of all GPUs of the experiment; past the daemon. Not while a Watch looks."""
        uuids = {gpu["uuid"] for gpu in self.gpus}
        return sum(one.used_bytes for one in self.cards.read() if one.uuid in uuids)

    def models(self) -> dict[str, Json]:
        return {model["name"]: model for model in self._api.get("/models")["models"]}

    def model(self, name: str) -> Json:
        return self._api.get(_path(name))

    def plan(self, name: str) -> Json:
        """What loading it would do now."""
        return self._api.get(_path(name, "/plan"))

    def events(self, since: float) -> list[Json]:
        """Those since that moment (time.time()), oldest first."""
        return sorted(
            (one for one in self._api.get("/events?tail=10000")["events"] if one["at"] >= since), key=lambda one: float(one["at"])
        )

    def watch(self) -> Watch:
        uuids = [gpu["uuid"] for gpu in self.gpus]
        return Watch(self.cards, uuids, self.models, lambda: int(self._api.get("/status")["pid"]), self._tolerated)

    @property
    def trim_s(self) -> float:
        """After so long an idle engine of these models gives back its caches."""
        return max(float(self.before[name]["spec"].get("idle_trim") or 0.0) for name in self.names)

    def start_s(self, name: str) -> float:
        return float((self.before[name].get("footprint") or {}).get("start_s") or (2.0 if self.simulated else COLD_S))

    def longest(self) -> dict[str, int]:
        """Tokens of a request, prompt and answer, of those models whose arguments bound them (--max-model-len)."""
        found = {}
        for name in self.names:
            spec = self.before[name]["spec"]
            words = [*self.status.get("engines", {}).get(spec["engine"], {}).get("args", ()), *spec["args"]]
            if bound := parse_tokens(flag_in(words, "--max-model-len")):
                found[name] = bound
        return found

    # ---- the other arm ----------------------------------------------------------------------------------------------

    def recipe(self, name: str, utilization: float, fixed_pool: bool = False) -> Recipe:
        """A static engine of this model with `utilization` of its GPUs. `fixed_pool`: its KV is said rather than found out; its model
        must have been started once, so that what it needs besides is known."""
        model = self.model(name)
        spec = model["spec"]
        venv = self.venv(str(spec["engine"]))
        pool = None
        if fixed_pool:
            card = min(int(gpu["total_bytes"]) for gpu in self.gpus)
            besides = int(model["footprint"]["total_bytes"])
            pool = int(card * utilization) - besides
            if pool <= 0:
                raise Trouble(
                    f"{name} as a static engine: {utilization:.0%} of the card is less than the {show_bytes(besides)} that it needs without"
                    " KV: leave the static engines out with --no-static"
                )
        tensor_parallel = int(spec["tensor_parallel_size"])
        gpus = self._placed.get(name) or [str(gpu["uuid"]) for gpu in self.gpus][:tensor_parallel]
        return Recipe(name, spec["source"], venv, spec["args"], spec["env"], gpus, tensor_parallel, utilization, pool)

    def venv(self, engine: str) -> EngineVenv:
        known = self.status.get("engines", {})
        if engine not in known and self._engine_python is None:
            raise Trouble(f"the daemon does not say what engine {engine!r} is: name its Python with --engine-python")
        found = known.get(engine, {"kind": "vllm", "args": [], "env": {}, "python": ""})
        return EngineVenv(str(found["kind"]), self._engine_python or Path(found["python"]), found["env"], found["args"])

    def versions(self) -> dict[str, str]:
        engines = {str(self.before[name]["spec"].get("engine", "default")) for name in self.names}
        found = {f"engine {name}": str(self.status.get("engines", {}).get(name, {}).get("version", "")) for name in sorted(engines)}
        return {"orchestrator": str(self.status["version"]), **found}

    # ---- what is done -----------------------------------------------------------------------------------------------

    def load(self, name: str, watch: Watch, tell: Callable[[str], None]) -> None:
        """Returns when it is ready. Raises Trouble where it does not become so."""
        self._api.send("POST", _path(name, "/load"))
        last = ""

        def there() -> bool:
            nonlocal last
            model = self.model(name)
            state, reason = str(model["state"]), str(model["reason"])
            if state in ("failed", "backoff"):
                failure = model.get("failure") or {}
                log = [str(line) for line in failure.get("log") or []][-3:]
                raise Trouble(f"{name} does not start: {failure.get('reason') or reason}", [*log, f"see `orchestratorctl logs {name}`"])
            if (said := f"{name}: {state}" + (f": {(model.get('engine') or {}).get('phase')}" if state == "starting" else "")) != last:
                tell(said)
                last = said
            if state == "ready":
                self._placed[name] = list(model["engine"]["gpus"])
            return state == "ready"

        if not watch.until(there, LOAD_S):
            raise Trouble(f"{name} is not ready after {LOAD_S:.0f} s: {last}; see `orchestratorctl describe {name}`")

    def unload(self, names: Sequence[str], watch: Watch | None = None) -> None:
        """Their requests end, and they are gone from the GPU. Raises Trouble where they do not go."""
        for name in names:
            if self.model(name)["state"] not in GONE:
                self._api.send("POST", _path(name, "/drain"))

        def gone() -> bool:
            return all(self.model(name)["state"] in GONE for name in names)

        if not (watch.until(gone, UNLOAD_S) if watch is not None else _until(gone, UNLOAD_S)):
            raise Trouble(f"{', '.join(names)}: not unloaded after {UNLOAD_S:.0f} s: do requests come all the time?")

    def restore(self, tell: Callable[[str], None]) -> None:
        """All models as they were found: what was ready is loaded again, the experiment's own go where they were."""
        now = self.models()
        for name, was in self.before.items():
            state, is_now = str(was["state"]), str(now.get(name, {}).get("state", "removed"))
            if name not in now or state == is_now:
                continue
            if state in ("ready", "starting", "waking") and is_now not in ("ready", "starting", "waking"):
                tell(f"{name} is loaded again")
                self._api.send("POST", _path(name, "/load"))
            elif name in self.names and state == "asleep" and is_now == "ready":
                tell(f"{name} sleeps again")
                self._api.send("POST", _path(name, "/sleep"))
            elif name in self.names and state in GONE and is_now not in GONE:
                tell(f"{name} is unloaded again")
                self._api.send("POST", _path(name, "/drain"))
            elif state == "asleep":
                tell(f"{name} was asleep and is {is_now} now: its next request starts it")

    def warm(self, endpoint: Endpoint, name: str, requests: int, tokens: int, timeout_s: float) -> None:
        """Raises Trouble where nothing is answered, with what was said instead."""

        async def all_of_them() -> list[answers.Answer]:
            prompts = [answers.prompt(64, f"warm {number}") for number in range(requests)]
            return list(await asyncio.gather(*(answers.ask(endpoint, name, ids, tokens, timeout_s) for ids in prompts)))

        given = self.asker.run(all_of_them())
        if given and all(answer.error for answer in given):
            self.check_daemon()
            if given[0].code in ("invalid_api_key", "missing_api_key", "http_401", "unauthorized"):
                raise Trouble(f"{str(given[0].error).rstrip('.')}: give a key with --api-key or OPENAI_API_KEY")
            raise Trouble(f"{name} answers nothing: {given[0].error}")

    # ---- before anything ----------------------------------------------------------------------------------------------

    def _cards(self) -> Cards:
        try:
            return cards(self._simulated_folder if self.simulated else None)
        except OSError as error:
            raise Trouble(f"the GPUs can not be read here: {error}", ["run it on the daemon's machine"]) from None

    @property
    def _simulated_folder(self) -> Path:
        return Path(self.status["admin_socket"]).parent / "simgpu"


def _until(probe: Callable[[], bool], most_s: float) -> bool:
    deadline = time.monotonic() + most_s
    while not probe():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as fault:
        raise Trouble(f"--foreign-tolerance: {fault}") from None


def _path(name: str, verb: str = "") -> str:
    return f"/models/{quote(name, safe='')}{verb}"
