"""The static engine: vLLM's command line without kvcached, as the daemon's engines in all else; one that fails says why."""

from pathlib import Path

import pytest

from orchestrator.drivers.simgpu import SimGpus
from orchestrator.drivers.vllm import EngineVenv
from orchestrator.experiments.answers import Endpoint, ask, prompt
from orchestrator.experiments.asker import Asker
from orchestrator.experiments.static_engine import Recipe, StaticEngine, command, environment
from orchestrator.experiments.trouble import Trouble
from tests.support.eventually import eventually_now

GIB = 1 << 30
DUMMY = ("--load-format", "dummy", "--enforce-eager")


def recipe(kind: str = "simulated", python: str = "/engine/bin/python", pool: int | None = None, **env: str) -> Recipe:
    venv = EngineVenv(kind, Path(python), {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "(hidden)"}, DUMMY)
    return Recipe("qwen", "qwen-0.5b", venv, ("--max-model-len", "4096"), env, ["GPU-sim-0"], 1, 0.5, pool)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimGpus:
    """One card of 16 GiB, which engines that are started find."""
    monkeypatch.setenv("SIM_GPU_DIR", str(tmp_path))
    monkeypatch.setenv("SIM_LOAD_S", "0")
    return SimGpus(tmp_path, 1, 16 * GIB)


def test_it_gets_the_arguments_of_its_venv_and_its_model() -> None:
    words = command(recipe("vllm"), Path("/run/api.sock"))
    assert words[:3] == ["/engine/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert words[-5:] == [*DUMMY, "--max-model-len", "4096"]
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.5"
    assert "--kv-cache-memory-bytes" not in words
    assert str(GIB) in command(recipe("vllm", pool=GIB), Path("/run/api.sock"))


def test_its_environment_knows_no_kvcached_and_has_secrets_from_here_alone() -> None:
    env = environment(recipe("vllm", KVCACHED_MIN_RESERVED_PAGES="3"), Path("/run"), {"HF_TOKEN": "hf_x", "VLLM_PORT": "1", "PATH": "/bin"})
    assert {name: value for name, value in env.items() if "KVCACHED" in name} == {"KVCACHED_AUTOPATCH": "0"}
    assert (env["HF_TOKEN"], env["HF_HUB_OFFLINE"], env["CUDA_VISIBLE_DEVICES"]) == ("hf_x", "1", "GPU-sim-0")
    assert "VLLM_PORT" not in env
    assert "HF_TOKEN" not in environment(recipe("vllm"), Path("/run"), {})


def test_it_takes_its_share_answers_and_gives_all_back(card: SimGpus, tmp_path: Path) -> None:
    with Asker() as asker, StaticEngine(recipe(), tmp_path / "static.log") as engine:
        eventually_now(lambda: engine.ready(asker), "it is ready")
        assert card.read()[0].used_bytes == pytest.approx(8 * GIB, rel=0.05)
        answer = asker.run(ask(engine.endpoint, "qwen", prompt(64, "x"), 5, 20.0))
        assert (answer.error, answer.tokens, answer.first_s is not None) == (None, 5, True)
        refused = asker.run(ask(engine.endpoint, "nobody", [1], 5, 20.0))
        assert (refused.code, refused.tokens) == ("404", 0)
    assert card.read()[0].processes == {}
    assert not engine.folder.exists()
    with Asker() as asker:
        assert asker.run(ask(engine.endpoint, "qwen", [1], 5, 20.0)).code == "connection"
        assert asker.run(ask(Endpoint(url="http://127.0.0.1:9"), "qwen", [1], 5, 20.0)).code == "connection"


def test_one_that_dies_at_its_start_says_why(card: SimGpus, tmp_path: Path) -> None:
    log = tmp_path / "static.log"
    with Asker() as asker, StaticEngine(recipe(SIM_FAULT="die_at_start"), log) as engine, pytest.raises(Trouble) as found:
        eventually_now(lambda: engine.ready(asker), "it is ready")
    assert "the static engine of qwen exited with code 1" in found.value.message
    assert "simulated failure at start" in found.value.lines[0]
    assert str(log) in found.value.lines[1]


def test_one_whose_keeper_is_killed_is_ended_all_the_same(card: SimGpus, tmp_path: Path) -> None:
    with Asker() as asker, StaticEngine(recipe(), tmp_path / "static.log") as engine:
        eventually_now(lambda: engine.ready(asker), "it is ready")
        engine._keeper.kill()
        with pytest.raises(Trouble, match="lost its keeper"):
            eventually_now(lambda: engine.ready(asker) and False, "it is seen")
    assert card.read()[0].processes == {}
    assert not engine.folder.exists()


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(Trouble, match=r"no Python to run at /nowhere/python.*--engine-python"),
        StaticEngine(recipe("vllm", "/nowhere/python"), tmp_path / "log"),
    ):
        pass
