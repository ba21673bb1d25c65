"""explain: lines that add up, to the eye and to the byte; GPUs and models by any of their names."""

import json
import random
import re

import pytest

from orchestrator.cli.explain import whole_mib

from .conftest import Ctl
from .stub_daemon import GIB, MIB, Reply, StubDaemon, engine, error, explained, explained_pool, line, model


def sizes(text: str) -> dict[str, int]:
    """What a reader would add up: the MiB of each line by its first word; lines alike are summed."""
    found: dict[str, int] = {}
    for what, mib in re.findall(r"^(\w+) +(-?\d+)MiB  ", text, re.MULTILINE):
        found[what] = found.get(what, 0) + int(mib)
    return found


def test_every_gpu_adds_up(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.gpus = [explained(0), explained(1, pools=[])]
    said = ctl("explain")
    assert said.exit_code == 0
    first, second = said.stdout.split("GPU 1: NVIDIA H200, GPU-1a-beef")
    assert first.startswith("GPU 0: NVIDIA H200, GPU-0a-beef\n")
    shown = sizes(first)
    assert shown.pop("total") == sum(shown.values()) == 140 * 1024
    words = [" ".join(each.split()) for each in first.splitlines()]
    for each in (
        "WHAT SIZE MODEL WHY",
        "reserve 2048MiB - kept free",
        "foreign 10240MiB - alice: python3 (pid 4711); not ours",
        "fixed 34816MiB qwen weights and context",
        "claim 9216MiB night it is starting",
        "room 66560MiB - free for KV to grow into",
        "total 143360MiB - the card; the lines add up to it",
        "KV memory for all pools of this GPU: 85.0GiB",
        "MODEL LIMIT USED PREALLOC FLOOR CEILING DEMAND TARGET WEIGHT STATUS",
        "qwen 20.0GiB 640MiB 64MiB 2.0GiB 60.0GiB 22.0GiB 24.0GiB 2 applied",
        "qwen it needs more",
        "what would change it: alice's memory coming back",
    ):
        assert each in words, each
    assert "no KV pool on this GPU" in second
    assert "\x1b" not in said.stdout


def test_json_is_the_apis_own(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.gpus = [explained(0), explained(1)]
    assert json.loads(ctl("explain", "--json").stdout) == {"gpus": daemon.gpus}
    assert json.loads(ctl("explain", "1", "--json").stdout) == {"gpus": [daemon.gpus[1]]}


@pytest.mark.parametrize("gap", [-3, 2 * GIB])
def test_lines_that_do_not_add_up_are_told_on(daemon: StubDaemon, ctl: Ctl, gap: int) -> None:
    daemon.gpus = [explained(total_bytes=140 * GIB - gap)]
    said = ctl("explain")
    way = "more" if gap > 0 else "less"
    assert (
        f"these lines do NOT add up: they sum to {140 * GIB} bytes, {abs(gap)} {way} than the card; a fault of the daemon's" in said.stdout
    )
    assert "the lines add up" not in said.stdout


def test_missing_memory_is_a_negative_room(daemon: StubDaemon, ctl: Ctl) -> None:
    lines = [line("reserve", 4 * MIB), line("foreign", 10 * GIB, who="bob"), line("room", -4 * MIB, why="4MiB are missing")]
    daemon.gpus = [explained(total_bytes=10 * GIB, lines=lines)]
    said = ctl("explain").stdout
    assert sizes(said) == {"reserve": 4, "foreign": 10240, "room": -4, "total": 10240}
    assert "the lines add up" in said


def test_what_is_shown_adds_up_where_bytes_do_not_round() -> None:
    dice = random.Random(7)
    for _ in range(500):
        values = [dice.randrange(-3 * GIB, 60 * GIB) for _ in range(dice.randrange(1, 12))]
        shown = whole_mib(values)
        assert [sum(shown)] == whole_mib([sum(values)])
        assert all(abs(mib - value / MIB) < 1 for mib, value in zip(shown, values, strict=True))
    assert whole_mib([]) == []
    assert whole_mib([2 * MIB, MIB // 2, MIB // 2]) == [2, 1, 0]  # whole ones stay as they are


def test_a_gpu_that_cannot_be_read(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.gpus = [explained(0, error="GPU_IS_LOST"), explained(1, error="GPU_IS_LOST", total_bytes=0, lines=[], pools=[])]
    first, second = ctl("explain").stdout.split("\n\nGPU 1: NVIDIA")
    assert "GPU 0: GPU_IS_LOST\nthese figures are the last that could be read\n" in first
    assert second.splitlines()[1:] == ["GPU 1: GPU_IS_LOST"]


def test_no_gpu(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.gpus = []
    assert ctl("explain").stdout == "no GPU seen\n"


def test_the_name_of_a_process_can_not_drive_the_terminal(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.gpus = [explained(total_bytes=GIB, lines=[line("foreign", GIB, who="eve: \x1b[2Ja\x07\x1b]0;b\nroom 9MiB (pid 1)")])]
    said = ctl("explain").stdout
    assert "eve: a??]0;b?room 9MiB (pid 1); because\n" in said
    assert re.findall(r"[^\n -~]", said) == []


@pytest.mark.parametrize("name", ["1", "01", "GPU-1a-beef", "gpu-1A-BEEF", "GPU-1"])
def test_a_gpu_by_any_of_its_names(daemon: StubDaemon, ctl: Ctl, name: str) -> None:
    daemon.gpus = [explained(0), explained(1)]
    said = ctl("explain", name)
    assert said.exit_code == 0, said.stderr
    assert [each[:5] for each in said.stdout.splitlines() if each.startswith("GPU ")] == ["GPU 1"]


def test_a_name_that_begins_two_uuids(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.gpus = [explained(0), explained(1)]
    said = ctl("explain", "GPU-", "--json")
    assert said.exit_code == 2
    assert "'GPU-' begins the UUIDs of 2 GPUs: write more of it, or the index\n  GPU 0: GPU-0a-beef\n" in said.stderr
    assert json.loads(said.stdout)["error"]["code"] == "usage"


@pytest.mark.parametrize("name", ["9", "GPU-9", "no/such"])
def test_neither_gpu_nor_model(daemon: StubDaemon, ctl: Ctl, name: str) -> None:
    said = ctl("explain", name, "--json")
    assert said.exit_code == 4
    assert f"the model {name!r} does not exist\nnor is it a GPU; there are:\n  GPU 0: GPU-0a-beef\n" in said.stderr
    assert json.loads(said.stdout)["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["qwen", "q"])
def test_a_model_and_all_others_add_up(daemon: StubDaemon, ctl: Ctl, name: str) -> None:
    daemon.models = [model()]
    daemon.gpus = [explained(0, pools=[explained_pool(), explained_pool(model="small", reason="idle")]), explained(1, lines=[], pools=[])]
    said = ctl("explain", name)
    assert said.exit_code == 0, said.stderr
    assert sizes(said.stdout) == {"fixed": 34816, "kv": 20480, "others": 88064, "total": 143360}
    assert "the lines add up" in said.stdout
    assert "reserve 2048MiB, foreign 10240MiB, claim 9216MiB, room 66560MiB" in said.stdout
    assert "GPU 1" not in said.stdout
    assert "small" not in said.stdout
    (shown,) = json.loads(ctl("explain", name, "--json").stdout)["gpus"]
    assert sum(each["bytes"] for each in shown["lines"]) == shown["total_bytes"]
    assert [each["model"] for each in shown["pools"]] == ["qwen"]


def test_a_model_named_like_the_beginning_of_a_uuid(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("GPU-0", aliases=[])]
    daemon.gpus = [explained(lines=[line("kv", 140 * GIB, "GPU-0")], pools=[])]
    assert sizes(ctl("explain", "GPU-0").stdout) == {"kv": 143360, "total": 143360}


def test_a_model_that_starts_has_a_claim_and_no_pool(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("night", "starting", aliases=[], engine=engine(gpus=["GPU-0a-beef", "GPU-1a-beef"]))]
    daemon.gpus = [explained(0), explained(1, lines=[line("room", 140 * GIB)], pools=[]), explained(2, lines=[], pools=[])]
    said = ctl("explain", "night").stdout
    assert sizes(said) == {"claim": 9216, "others": 131 * 1024 + 140 * 1024, "total": 2 * 140 * 1024}
    assert said.count("night is starting and has no KV pool here") == 2
    assert "GPU 2" not in said


def test_a_model_without_memory_is_not_running(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("idle", "waiting", aliases=[], reason="needs 17.0GiB, 3.0GiB are free")]
    said = ctl("explain", "idle", "--json")
    assert said.exit_code == 3
    assert "idle is waiting and has no GPU memory: needs 17.0GiB, 3.0GiB are free\n" in said.stderr
    assert "`orchestratorctl explain` shows who has the memory" in said.stderr
    assert json.loads(said.stdout)["error"]["model"]["name"] == "idle"


def test_a_refusal_is_not_taken_for_an_unknown_model(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/models/GPU-0"] = error(503, "shutting down", "shutting_down")
    assert ctl("explain", "GPU-0").exit_code == 75


def test_an_answer_without_gpus_is_a_strangers(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/explain"] = Reply(200, {"status": "ok"})
    assert ctl("explain").exit_code == 69
