"""ls, ps, describe, logs, status: what a person reads and what a script gets."""

import json

from .conftest import Ctl
from .stub_daemon import GIB, Reply, StubDaemon, engine, error, failure, gpu, model, pool, status


def test_ls_lists_every_model_in_columns(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [
        model("qwen", in_flight=3, waiting=2, idle_s=0.4),
        model("org/night", "stopped", owner="file", idle_s=7380.0),
    ]
    said = ctl("ls")
    lines = [line.split() for line in said.stdout.splitlines()]
    assert lines[0] == ["NAME", "STATE", "SOURCE", "GPU", "KV-USED", "KV-LIMIT", "REQUESTS", "IDLE", "OWNER"]
    assert lines[1] == ["qwen", "ready", "Qwen/Qwen2.5-7B-Instruct", "0", "640MiB", "20.0GiB", "3+2", "0s", "api"]
    assert lines[2] == ["org/night", "stopped", "Qwen/Qwen2.5-7B-Instruct", "-", "-", "-", "0", "2h03m", "file"]
    assert said.stderr == ""
    first, second = said.stdout.splitlines()[1:]
    assert first.index("ready") == second.index("stopped")


def test_ls_of_nothing_is_a_header(daemon: StubDaemon, ctl: Ctl) -> None:
    said = ctl("ls")
    assert said.stdout.split()[0] == "NAME"
    assert len(said.stdout.splitlines()) == 1


def test_ls_json_is_the_list_object(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model()]
    assert json.loads(ctl("ls", "--json").stdout) == {"models": daemon.models}
    assert json.loads(ctl("--json", "ls").stdout) == {"models": daemon.models}


def test_ps_shows_only_models_with_an_engine(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("a"), model("b", "stopped"), model("c", "draining", pool=pool(status="draining"))]
    lines = [line.split() for line in ctl("ps").stdout.splitlines()]
    assert lines[0] == ["NAME", "STATE", "PID", "GPU", "VRAM", "KV-USED", "KV-LIMIT", "LIMIT-STATUS", "REQUESTS", "UP"]
    assert lines[1] == ["a", "ready", "4242", "0", "17.0GiB", "640MiB", "20.0GiB", "applied", "0", "5m12s"]
    assert [line[0] for line in lines[1:]] == ["a", "c"]
    assert [each["name"] for each in json.loads(ctl("ps", "--json").stdout)["models"]] == ["a", "c"]


def test_describe_tells_everything(daemon: StubDaemon, ctl: Ctl) -> None:
    told = model(
        "org/qwen",
        "backoff",
        reason="out of memory",
        held=True,
        since_s=75.0,
        failure=failure(),
        engine=engine("loading weights", 1),
        pool=pool(),
        footprint={
            "source": "learned",
            "total_bytes": 17 * GIB,
            "parts": {"weights": 15 * GIB, "graphs": 2 * GIB},
            "start_s": 41.0,
        },
        events=[{"at": 1_700_000_000.0, "kind": "start", "reason": "a request waits"}],
    )
    daemon.models = [told]
    page = ctl("describe", "org/qwen").stdout
    words = " ".join(page.split())
    for each in (
        "State backoff for 1m15s",
        "Held yes",
        "Owner api",
        "Reason out of memory",
        "Count 2 in a row",
        "Next try in 8s",
        "| CUDA OOM",
        "PID 4242",
        "loading weights (2/5)",
        "about 41s",
        "GPU 0 (GPU-0a)",
        "VRAM 17.0GiB",
        "/var/log/o/qwen.log",
        "orch-qwen-a1b2",
        "Used 640MiB, and 64MiB preallocated",
        "Limit 20.0GiB (applied)",
        "Page bundle 56MiB",
        "weights 15.0GiB",
        "total 17.0GiB (learned)",
        "kv_floor 2.0GiB",
        "idle_timeout 30m00s",
        "pinned no",
        "start a request waits",
    ):
        assert each in words, each
    assert "hf_x" not in page
    assert "HF_TOKEN=*** A=1" in page
    assert "\x1b" not in page
    assert daemon.sent("GET").path == "/api/v1/models/org%2Fqwen"
    assert json.loads(ctl("describe", "org/qwen", "--json").stdout) == told


def test_describe_says_never_for_no_idle_timeout(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model(spec={"idle_timeout": None, "kv_ceiling": None, "max_queue": 0})]
    words = " ".join(ctl("describe", "qwen").stdout.split())
    assert "max_queue 0 idle_timeout never" in words
    assert "kv_ceiling" not in words


def test_describe_of_a_bare_model_has_no_empty_parts(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("m", "stopped", spec={}, aliases=[])]
    page = ctl("describe", "m").stdout
    for title in ("Aliases", "Engine", "KV pool", "Failure", "Footprint", "Events", "Spec", "Held", "Idle"):
        assert title not in page


def test_logs_come_as_they_are(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.logs["qwen"] = ["one\ntw", "o\n", "no newline at the end"]
    said = ctl("logs", "qwen", "--tail", "7")
    assert said.stdout == "one\ntwo\nno newline at the end"
    assert daemon.sent("GET").path == "/api/v1/models/qwen/logs?tail=7"


def test_logs_in_a_pipe_lose_their_colour(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.logs["qwen"] = ["\x1b[31mred\x1b[0m\n"]
    assert ctl("logs", "qwen").stdout == "red\n"


def test_logs_json(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.logs["qwen"] = ["one\n", "two\n"]
    assert json.loads(ctl("logs", "qwen", "--json").stdout) == {"name": "qwen", "lines": ["one", "two"]}


def test_logs_of_a_model_that_never_ran(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.logs["m"] = []
    daemon.models = [model("m", "stopped")]
    said = ctl("logs", "m")
    assert said.exit_code == 3
    assert "m is stopped and has no log: `orchestratorctl start m` starts it" in said.stderr
    assert said.stdout == ""


def test_logs_of_an_engine_that_wrote_nothing_yet(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.logs["m"] = []
    daemon.models = [model("m", "starting")]
    assert ctl("logs", "m").exit_code == 0


def test_not_running_is_a_code_of_its_own(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/models/m/logs"] = error(409, "m has no engine", "not_running")
    assert ctl("logs", "m").exit_code == 3


def test_status_shows_daemon_gpus_and_counts(daemon: StubDaemon, ctl: Ctl) -> None:
    seen = status(gpus=[gpu(0), gpu(1, error="GPU_IS_LOST", used_bytes=None, age_s=12.0)], gpu_source="simulated")
    daemon.replies["GET", "/status"] = Reply(200, seen)
    said = ctl("status")
    words = " ".join(said.stdout.split())
    for each in (
        "orchestratord 0.1.0, pid 812, up 2h03m",
        "http://0.0.0.0:8000",
        "/etc/o/o.yaml",
        "simulated: no real GPU",
        "2 ready, 1 stopped",
        "12 ticks, last 1.2ms, 0 errors",
        "GPU 1: GPU_IS_LOST",
        "GPU 1: this reading is 12s old",
    ):
        assert each in words, each
    header, first = [line.split() for line in said.stdout.splitlines() if line.startswith(("GPU  ", "0 "))]
    row = dict(zip(header, first, strict=True))
    assert row == {
        "GPU": "0",
        "TOTAL": "140.0GiB",
        "USED": "50.0GiB",
        "FREE": "90.0GiB",
        "OURS": "40.0GiB",
        "FOREIGN": "10.0GiB",
        "CLAIMS": "0MiB",
        "RESERVE": "2.0GiB",
        "KV-POOL": "88.0GiB",
        "KV-USED": "6.0GiB",
        "KV-LIMIT": "80.0GiB",
        "NAME": "NVIDIA-H200",
    }
    assert json.loads(ctl("status", "--json").stdout) == seen


def test_status_has_a_line_for_each_launch_server(daemon: StubDaemon, ctl: Ctl) -> None:
    ready = {
        "state": "ready", "reason": None, "pid": 77, "rss_bytes": GIB, "pss_bytes": GIB // 2, "import_s": 15.2, "threads": 1,
        "versions": {"vllm": "0.24.0", "kvcached": "0.1.6"}, "forks": 4,
    }  # fmt: skip
    nothing: dict[str, object] = {
        "pid": None,
        "rss_bytes": None,
        "pss_bytes": None,
        "import_s": None,
        "threads": None,
        "versions": {},
        "forks": 0,
    }
    failed = {**nothing, "state": "failed", "reason": "ImportError: no module named \x1b[31mvllm\x1b[0m"}
    servers = {"default": ready, "new": failed, "off": {**nothing, "state": "off", "reason": None}}
    daemon.replies["GET", "/status"] = Reply(200, status(launch_servers=servers))
    lines = [line.removeprefix("Launch servers").strip() for line in ctl("status").stdout.splitlines()]
    assert "default: ready, pid 77, 1.0GiB (512MiB its share), vllm 0.24.0, kvcached 0.1.6, imported in 15s, 4 engines forked" in lines
    assert "new: failed, ImportError: no module named vllm" in lines
    assert "off: off" in lines
    daemon.replies["GET", "/status"] = Reply(200, status())
    assert "Launch servers" not in ctl("status").stdout
