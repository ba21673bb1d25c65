"""What is changed in an engine's start (engine/vllm/serve.py) changes no answer: greedy answers are the same, forked, executed or plain.

On a GPU box only:

    ENGINE_PYTHON=/opt/orchestrator/engine/bin/python ENGINE_MODEL=/models/qwen-0.5b pytest -m gpu tests/contract/test_same_words.py
"""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.drivers import kvcached, processes, vllm
from orchestrator.drivers.launch_server import LaunchServers
from orchestrator.drivers.nvml import Nvml
from orchestrator.drivers.vllm import EngineApi, EngineVenv
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import ModelSpec
from tests.api.rawclient import Client
from tests.contract.test_engine_manners import AS_HERE, TWO_GPUS

START_S = 120.0
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["ann", "bob"]}, "n": {"enum": [1, 2]}}, "required": ["name", "n"]}
GREEDY = {"model": "m", "temperature": 0, "seed": 1}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("/v1/completions", {"prompt": "The quick brown fox", "max_tokens": 64, "ignore_eos": True, "logprobs": 2}),
    "long": ("/v1/completions", {"prompt": "word " * 3000, "max_tokens": 16, "ignore_eos": True}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "žluťoučký 🐎"}], "max_tokens": 32, "ignore_eos": True}),
    "json": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a name and a number"}],
            "max_tokens": 64,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        },
    ),
    "tokens": ("/tokenize", {"prompt": "žluťoučký kůň 🐎 <|im_start|>"}),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif("ENGINE_PYTHON" not in os.environ, reason="no engine venv: set ENGINE_PYTHON and ENGINE_MODEL"),
]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=TWO_GPUS)])
def test_answers_are_the_same_however_an_engine_was_started(tmp_path: Path, ranks: int) -> None:
    env = {"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", **AS_HERE}
    plain = asyncio.run(answers(tmp_path / "plain", env | {"ENGINE_PLAIN_START": "1"}, ranks, forked=False))
    assert asyncio.run(answers(tmp_path / "executed", env, ranks, forked=False)) == plain
    assert asyncio.run(answers(tmp_path / "forked", env, ranks, forked=True)) == plain
    assert plain["json"][0]["message"]["content"].lstrip().startswith("{")  # random weights may go on with spaces for ever


async def answers(folder: Path, env: dict[str, str], ranks: int, forked: bool) -> dict[str, Any]:
    await asyncio.to_thread(folder.mkdir)
    processes.adopt_orphans()
    args = ["--enforce-eager", "--load-format", "dummy"]
    venv = EngineVenv(python=Path(os.environ["ENGINE_PYTHON"]), env=env, args=args, launch_server=forked)
    gpus = tuple(gpu.uuid for gpu in Nvml().read()[:ranks])
    spec = ModelSpec(name="m", source=os.environ["ENGINE_MODEL"], tensor_parallel_size=ranks)
    launch = Launch(folder.name, f"words-{os.getpid()}-{folder.name}", spec, gpus, 0, 0, 8 << 30)
    servers = LaunchServers({"default": venv}, folder)
    argv, environment = vllm.command(launch, venv, folder / "s"), vllm.environment(launch, venv, folder, os.environ)
    if forked:
        process, child = await servers.fork("default", argv, environment, folder / "log")
    else:
        process, child = processes.spawn(argv, environment, folder / "log")
    try:
        api = EngineApi(folder / "s")
        async with asyncio.timeout(START_S):
            while not await api.healthy():
                assert child is None or child.poll() is None, "it ended"
                await asyncio.sleep(0.05)
        await api.close()
        return {name: await _ask(folder / "s", path, body) for name, (path, body) in ASKED.items()}
    finally:
        processes.signal_session(process, signal.SIGKILL)
        if child is not None:
            await asyncio.to_thread(child.wait, 30)
        await servers.close()
        kvcached.remove(launch.ipc_name)


async def _ask(path: Path, target: str, body: dict[str, Any]) -> Any:
    """Its words; of an answer that has none, all of it."""
    client = Client(*await asyncio.open_unix_connection(path))
    await client.request(target, json.dumps(GREEDY | body).encode())
    answer = await client.answer()
    assert answer.status == 200, answer.body
    return answer.json.get("choices", answer.json)
