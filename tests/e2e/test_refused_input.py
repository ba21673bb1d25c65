"""What add-model refuses: exit code and words that say which value, why and the mend; and nothing of it is kept."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.running import Daemon

Listed = list[tuple[str, str, object]]


def listed(models: list[dict[str, Any]]) -> Listed:
    """Without its clocks."""
    return [(model["name"], model["state"], model["spec"]) for model in models]


def ls(daemon: Daemon) -> Listed:
    done = daemon.ctl("ls", "--json")
    assert done.returncode == 0
    return listed(json.loads(done.stdout)["models"])


@pytest.fixture(scope="module")
def before(daemon: Daemon) -> Listed:
    daemon.add(daemon.name("taken"), "--no-start")
    return ls(daemon)


@pytest.fixture
def unchanged(daemon: Daemon, before: Listed) -> Iterator[None]:
    yield
    assert listed(daemon.get("/models")["models"]) == before
    assert daemon.remains() == {}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["NEW", "/nowhere/at/all"], 78, ["source: there is no folder '/nowhere/at/all'"]),
        (["NEW", "MODEL/config.json"], 78, ["source: ", "is a file: name the model's folder"]),
        (["NEW", "MODEL", "--gpu", "7"], 78, ["gpus: no GPU here is 7; there are: 0 (GPU-sim-0)"]),
        (["NEW", "MODEL", "--tp", "2"], 78, ["tensor_parallel_size: 2 GPUs wanted, 1 here"]),
        (["NEW", "MODEL", "--kv-floor", "2GiB", "--kv-ceiling", "1GiB"], 78, ["kv_floor", "above kv_ceiling", "lower the floor"]),
        (["NEW", "MODEL", "--kv-ceiling", "16MiB"], 78, ["kv_ceiling: 16MiB cannot hold one request of 8192 tokens", "raise it"]),
        (["NEW", "MODEL", "--kv-floor", "3GB"], 78, ["kv_floor: '3GB' is ambiguous (decimal or binary?): write 3GiB"]),
        (
            ["NEW", "MODEL", "--kv-floor", "90GiB"],
            78,
            ["can never fit: it needs 9", "weights ", " + context 1024MiB", " + KV floor 90.0GiB", "GPU 0 has 80.0GiB, of which 2458MiB"],
        ),
        (["NEW", "MODEL", "--engine", "nope"], 78, ["engine: there is no engine 'nope'; known: default"]),
        (["NEW", "MODEL", "--", "--port", "1"], 78, ["args: --port belongs to the daemon: remove it"]),
        (["NEW", "MODEL", "--", "--gpu_memory_utilization=0.5"], 78, ["--gpu-memory-utilization belongs", "kv_floor and kv_ceiling"]),
        (["NEW", "MODEL", "--env", "KVCACHED_IPC_NAME=x"], 78, ["env: KVCACHED_IPC_NAME belongs to the daemon"]),
        (["no spaces", "MODEL", "--priority", "9", "--kv-floor", "x"], 78, ["3 problems", "name: ", "priority: ", "kv_floor: "]),
        (["TAKEN", "MODEL"], 1, ["is a model that is registered already", "orchestratorctl rm"]),
        (["NEW", "MODEL", "--alias", "TAKEN"], 1, ["is a model that is registered already"]),
        (["NEW", "MODEL", "--tp", "0"], 2, ["--tp"]),
        (["NEW"], 2, ["SOURCE"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else str(value),
)
def test_add_model(daemon: Daemon, words: list[str], code: int, says: list[str]) -> None:
    known = {"NEW": daemon.name("new"), "TAKEN": daemon.name("taken")}
    given = [known.get(word, word.replace("MODEL", str(daemon.model_folder))) for word in words]
    done = daemon.ctl("add-model", *given)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    for text in says:
        assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_ls_is_what_it_was_before_all_this(daemon: Daemon, before: Listed) -> None:
    assert ls(daemon) == before
    assert [name for name, _, _ in before] == [daemon.name("taken")]
