"""The simulated engine as a daemon meets it: real processes, a real segment in /dev/shm, memory of a simulated card."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from .conftest import Ballast, Launch
from .harness import (
    BUNDLE,
    CONTEXT,
    MIB,
    PROFILE,
    TOKENS_PER_PAGE,
    WEIGHTS,
    Engine,
    Reply,
    eventually,
    holds,
    used_bytes,
)

CAPACITY = 50 * BUNDLE
BASE = 600 * MIB
START_KV = 7 * BUNDLE  # zero page, null page, five reserved


def finished(request: HTTPConnection) -> Reply:
    with contextlib.closing(request) as connection:
        return Reply(connection.getresponse())


# Start


def test_start(launch: Launch, gpu_dir: Path) -> None:
    engine = launch("--enable-sleep-mode").ready()
    assert engine.segment() == (CAPACITY, BUNDLE, 5 * BUNDLE)
    assert used_bytes(gpu_dir) == BASE + CONTEXT + WEIGHTS + PROFILE + START_KV
    assert os.getsid(engine.core) == engine.process.pid
    assert (engine.worker_folder / "w0.sock").is_socket()
    reply = engine.complete(max_tokens=2)
    assert reply.json["choices"][0]["text"] == "tiny w1 w2"
    log = engine.log
    lines = (
        "vLLM server version 0.24.0",
        "non-default args: ",
        "Successfully patched vllm: ",
        "Starting to load model ",
        "Loading weights took ",
        "Model loading took 0.04 GiB memory",
        "Init C++ PageAllocator: num_layers=2, ",
        "Application startup complete.",
    )
    places = [log.find(line) for line in lines]
    assert -1 not in places
    assert places == sorted(places)


def test_it_starts_fast(launch: Launch) -> None:
    engine = launch().ready()
    ticks = sum(
        int(field) for pid in engine.session() for field in Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13]
    )
    assert ticks / os.sysconf("SC_CLK_TCK") < 1.0  # 0.4 on a quiet machine


def test_the_pool_without_a_given_size_is_the_share_of_the_card_less_all_else(launch: Launch) -> None:
    engine = launch("--gpu-memory-utilization", "0.5", kv=None).ready()
    wanted = 5120 * MIB - WEIGHTS - CONTEXT - PROFILE
    assert engine.segment()[0] == wanted // BUNDLE * BUNDLE


def test_an_engine_overwrites_the_limit_of_an_earlier_one(launch: Launch) -> None:
    first = launch().ready()
    first.set_total(3 * BUNDLE)
    first.kill_session()
    second = launch(KVCACHED_IPC_NAME=first.ipc).ready()
    assert second.process.poll() is None
    assert first.segment() == (CAPACITY, BUNDLE, 5 * BUNDLE)


def test_reserved_pages_follow_the_environment(launch: Launch) -> None:
    engine = launch(KVCACHED_MIN_RESERVED_PAGES="1", KVCACHED_MAX_RESERVED_PAGES="2").ready()
    assert engine.segment() == (CAPACITY, BUNDLE, BUNDLE)
    engine.complete(10 * TOKENS_PER_PAGE)
    engine.post("/reset_prefix_cache")
    eventually(lambda: engine.segment() == (CAPACITY, BUNDLE, 2 * BUNDLE), "the maximum reserve")


def test_tensor_parallel_takes_the_same_on_each_gpu(launch: Launch, gpu_dir: Path) -> None:
    engine = launch("-tp", "2").ready()
    assert used_bytes(gpu_dir, 0) == used_bytes(gpu_dir, 1) == BASE + CONTEXT + WEIGHTS // 2 + PROFILE + START_KV
    assert (engine.worker_folder / "w1.sock").is_socket()
    assert engine.rpc("kv_status")["mapped_bytes"] == 6 * BUNDLE  # one result, whatever the size


def test_cuda_visible_devices(launch: Launch, gpu_dir: Path) -> None:
    launch(CUDA_VISIBLE_DEVICES="GPU-sim-1").ready()
    assert used_bytes(gpu_dir, 0) == BASE
    assert used_bytes(gpu_dir, 1) > BASE


def test_without_kvcached_it_is_plain_vllm(launch: Launch, gpu_dir: Path) -> None:
    engine = launch("--gpu-memory-utilization", "0.6", ENABLE_KVCACHED="").ready()
    assert not engine.segment_path.exists()
    assert used_bytes(gpu_dir) == BASE + CONTEXT + WEIGHTS + PROFILE + CAPACITY
    assert engine.complete(3000).status == 200
    assert "Successfully patched" not in engine.log
    assert engine.rpc("kv_limit", BUNDLE, 1)["status"] == "unavailable"


# Starts that fail


@pytest.mark.parametrize(
    ("flags", "environment", "status", "said"),
    [
        (["--no-such-flag"], {}, 2, "unrecognized arguments: --no-such-flag"),
        (["--max-num-seqs", "many"], {}, 2, "invalid int value: 'many'"),
        (
            ["--max-model-len", "65k", "--kv-cache-memory-bytes", "8M"],
            {},
            1,
            "KV cache is needed, which is larger",
        ),
        (
            ["--kv-cache-memory-bytes", "0"],
            {},
            1,
            "No available memory for the cache",
        ),
        (["--max-model-len", "99999"], {}, 1, "max_model_len (99999) is greater than the derived max_model_len"),
        ([], {"SIM_FAULT": "die_at_start"}, 1, "RuntimeError: simulated failure at start"),
        (
            [],
            {"SIM_FAULT": "oom_at_start"},
            1,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 0.04 GiB",
        ),
        ([], {"CUDA_VISIBLE_DEVICES": ""}, 1, "No CUDA GPUs are available"),
        ([], {"SIM_FAULT": "no_such_fault"}, 1, "fault 'no_such_fault' is unknown"),
    ],
)
def test_a_failed_start(launch: Launch, gpu_dir: Path, flags: list[str], environment: dict[str, str], status: int, said: str) -> None:
    engine = launch(*flags, **environment)
    assert engine.wait() == status
    assert said in engine.log
    if "EngineCore pid" in engine.log:
        assert "RuntimeError: Engine core initialization failed. See root cause above." in engine.log.splitlines()[-1]
    assert used_bytes(gpu_dir) == BASE
    assert not engine.segment_path.exists()


def test_a_model_that_is_not_there(launch: Launch, tmp_path: Path) -> None:
    engine = launch(model=tmp_path / "nothing")
    assert engine.wait() == 1
    assert "Invalid repository ID or local directory specified" in engine.log


def test_a_stale_socket_file_makes_bind_fail(launch: Launch) -> None:
    first = launch().ready()
    second = launch("--uds", str(first.uds))
    assert second.wait() == 1
    assert "Address already in use" in second.log.splitlines()[-1]


def test_weights_that_do_not_fit(launch: Launch, ballast: Ballast, gpu_dir: Path) -> None:
    ballast(9640 * MIB - CONTEXT - 1)
    engine = launch()
    assert engine.wait() == 1
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 0.04 GiB" in engine.log
    assert used_bytes(gpu_dir) == BASE + 9640 * MIB - CONTEXT - 1


def test_hanging_at_the_start(launch: Launch) -> None:
    engine = launch(SIM_FAULT="hang_at_start")
    eventually(lambda: "Model loading took" in engine.log, "weights loaded")
    with pytest.raises(ConnectionRefusedError):
        engine.get("/health")
    engine.process.send_signal(signal.SIGTERM)
    assert engine.wait() == 130
    assert engine.session() == []


def test_the_null_page_waits_for_memory_and_the_first_request_with_it(launch: Launch, ballast: Ballast) -> None:
    foreign = ballast(9640 * MIB - CONTEXT - WEIGHTS - PROFILE - 512 * MIB)  # leaves the headroom, and no bundle over
    engine = launch().ready()
    assert engine.segment() == (CAPACITY, 0, 0)
    request = engine.start(1, 1)
    eventually(lambda: engine.counts() == (0, 1), "the request waits")
    assert "Waiting for physical KV capacity to reserve null block" in engine.log
    limit = engine.open("/collective_rpc", {"method": "kv_limit", "args": [CAPACITY, 1]})  # waits for it as well
    foreign.say(f"give {100 * MIB}")
    assert finished(request).status == 200
    assert finished(limit).json["results"][0]["status"] == "applied"


# Limits


def test_a_limit_is_ignored_while_idle_and_applied_by_an_allocation(launch: Launch, gpu_dir: Path) -> None:
    engine = launch().ready()
    before = used_bytes(gpu_dir)
    engine.set_total(3 * BUNDLE)
    assert holds(lambda: engine.segment() == (3 * BUNDLE, BUNDLE, 5 * BUNDLE))
    engine.poke_until(lambda: engine.segment() == (3 * BUNDLE, BUNDLE, 0), "the limit is applied")
    assert before - used_bytes(gpu_dir) == 5 * BUNDLE
    assert engine.rpc("kv_status")["limit_bytes"] == 3 * BUNDLE


def test_the_wedge_and_its_cure(launch: Launch) -> None:
    engine = launch().ready()
    engine.set_total(2 * BUNDLE)
    engine.poke_until(lambda: engine.rpc("kv_status")["limit_bytes"] == 2 * BUNDLE, "the limit is applied")
    big = engine.start(3 * TOKENS_PER_PAGE, 2)
    eventually(lambda: engine.counts() == (0, 1), "the big request waits")
    engine.set_total(CAPACITY)
    small = engine.start(1, 1)
    eventually(lambda: engine.counts() == (0, 2), "the small one waits behind it")
    assert holds(lambda: engine.counts() == (0, 2))
    assert engine.get("/health").status == 200
    eventually(lambda: engine.rpc("kv_limit", str(CAPACITY), "1")["status"] == "applied", "the watcher has seen it too")
    assert finished(big).status == finished(small).status == 200


def test_a_busy_engine_drains_only_as_requests_end(launch: Launch) -> None:
    engine = launch("--no-enable-prefix-caching").ready()
    requests = [engine.start(TOKENS_PER_PAGE, 20_000) for _ in range(8)]
    eventually(lambda: engine.counts() == (8, 0), "all run")
    used = engine.segment()[1]
    assert used >= 8 * BUNDLE
    engine.set_total(4 * BUNDLE)
    eventually(lambda: engine.rpc("kv_status")["limit_bytes"] == 4 * BUNDLE, "running requests apply the limit")
    assert engine.segment()[1] >= used
    waiting = engine.start(2 * TOKENS_PER_PAGE, 1)
    eventually(lambda: engine.counts()[1] >= 1, "the next request waits")
    for request in requests:
        request.close()
    assert finished(waiting).status == 200
    eventually(lambda: sum(engine.segment()[1:]) <= 4 * BUNDLE, "the pool is within its limit")


def test_limit_zero_is_ignored(launch: Launch) -> None:
    engine = launch().ready()
    engine.set_total(0)
    assert engine.complete().status == 200
    assert holds(lambda: engine.complete().status == 200)
    assert engine.complete(5 * TOKENS_PER_PAGE).status == 200
    assert engine.rpc("kv_status")["limit_bytes"] == CAPACITY


def test_limits_need_preallocation(launch: Launch) -> None:
    engine = launch(KVCACHED_PAGE_PREALLOC_ENABLED="false").ready()
    assert engine.segment() == (CAPACITY, BUNDLE, 0)
    engine.set_total(2 * BUNDLE)
    assert holds(lambda: engine.complete().status == 200)
    assert engine.rpc("kv_status")["limit_bytes"] == CAPACITY


def test_a_limit_above_the_start_kills_the_engine(launch: Launch) -> None:
    engine = launch().ready()
    engine.set_total(CAPACITY + BUNDLE)
    eventually(lambda: engine.complete().status == 500, "the core crashes in an allocation")
    assert engine.wait() == 0
    assert "IndexError: list index out of range" in engine.log


def settled(engine: Engine, limit_bytes: int, revision: int) -> dict[str, Any]:
    """The segment, and the RPC until the watcher has seen it."""
    engine.set_total(limit_bytes)
    eventually(lambda: engine.rpc("kv_limit", limit_bytes, revision)["status"] != "unsettled", "the watcher has seen it")
    answer: dict[str, Any] = engine.rpc("kv_limit", limit_bytes, revision)
    return answer


def test_the_rpc_limit(launch: Launch) -> None:
    engine = launch().ready()
    assert engine.rpc("kv_limit", str(3 * BUNDLE), "5")["status"] == "unsettled"
    assert engine.rpc("kv_status")["limit_bytes"] == CAPACITY
    applied = settled(engine, 3 * BUNDLE, 5)
    assert applied["status"] == "applied"
    assert (applied["mapped_bytes"], applied["remaining_bytes"], applied["overage_bytes"]) == (BUNDLE, 2 * BUNDLE, 0)
    assert engine.segment() == (3 * BUNDLE, BUNDLE, 0)
    assert settled(engine, 4 * BUNDLE, 4)["status"] == "stale"
    assert settled(engine, 4 * BUNDLE, 5)["status"] == "conflict"
    assert settled(engine, 0, 6)["status"] == "deferred"
    assert settled(engine, CAPACITY, 7)["effective_limit_bytes"] == CAPACITY
    assert engine.rpc("kv_limit", 10 * CAPACITY, 8)["effective_limit_bytes"] == CAPACITY
    assert engine.post("/collective_rpc", {"method": "kv_nothing"}).status == 500
    assert engine.post("/collective_rpc", {"method": "reload_weights"}).status == 500


def test_trim_and_empty_cache_give_memory_back(launch: Launch, gpu_dir: Path) -> None:
    engine = launch().ready()
    before = used_bytes(gpu_dir)
    assert engine.rpc("kv_trim") == {"ok": True, "mapped_bytes": BUNDLE}
    assert engine.rpc("kv_empty_cache") == {"ok": True, "freed_bytes": PROFILE}
    assert engine.rpc("kv_empty_cache") == {"ok": True, "freed_bytes": 0}
    assert before - used_bytes(gpu_dir) == 5 * BUNDLE + PROFILE
    assert engine.segment() == (CAPACITY, BUNDLE, 0)


def test_a_vanished_segment_comes_back_without_a_total(launch: Launch) -> None:
    engine = launch("--no-enable-prefix-caching").ready()
    engine.segment_path.unlink()
    assert engine.complete(2 * TOKENS_PER_PAGE).status == 200
    assert engine.segment()[0] == 0


def test_the_prefix_cache_stays_until_it_is_reset(launch: Launch) -> None:
    engine = launch().ready()
    engine.complete(8 * TOKENS_PER_PAGE)
    eventually(lambda: engine.counts() == (0, 0), "the request is done")
    assert engine.segment()[1] >= 8 * BUNDLE
    assert engine.post("/reset_prefix_cache").status == 200
    assert engine.segment()[1] == BUNDLE


# Two engines and a card


def test_two_engines_share_a_card_and_neither_dies(launch: Launch, ballast: Ballast, gpu_dir: Path) -> None:
    flags = ("--no-enable-prefix-caching",)
    first, second = launch(*flags).ready(), launch(*flags).ready()
    ballast(10240 * MIB - used_bytes(gpu_dir) - 512 * MIB - 10 * BUNDLE)
    long = first.start(13 * TOKENS_PER_PAGE, 10_000)  # null page and reserve, and most of what the card has left
    eventually(lambda: first.counts() == (1, 0), "the first engine runs")
    blocked = second.start(13 * TOKENS_PER_PAGE, 1)
    eventually(lambda: second.counts() == (0, 1), "the second engine waits for the card")
    assert holds(lambda: second.counts() == (0, 1), 0.2)
    long.close()
    eventually(lambda: first.counts() == (0, 0), "the first engine is idle")
    first.rpc("kv_trim")
    assert finished(blocked).status == 200
    assert first.complete().status == second.complete().status == 200


def test_four_pages_for_three_requests_that_grow_preempt_and_all_finish(launch: Launch) -> None:
    engine = launch("--no-enable-prefix-caching", "--max-model-len", "4k", kv="34M", SIM_STEP_S="0.001").ready()  # 4 pages
    requests = [engine.start(TOKENS_PER_PAGE - 100, 900) for _ in range(3)]
    assert {finished(request).json["usage"]["completion_tokens"] for request in requests} == {900}
    assert engine.metric("num_preemptions_total") > 0


# Ends


def test_sigterm_leaves_the_socket_files_only(launch: Launch, gpu_dir: Path) -> None:
    engine = launch().ready()
    began = time.monotonic()
    engine.process.send_signal(signal.SIGTERM)
    assert engine.wait() == 0
    assert time.monotonic() - began < 2.0  # 0.02 on a quiet machine
    assert engine.session() == []
    assert not engine.segment_path.exists()
    assert engine.uds.exists()
    assert (engine.worker_folder / "w0.sock").exists()
    assert used_bytes(gpu_dir) == BASE


def test_sigterm_waits_for_requests_when_asked_to(launch: Launch) -> None:
    engine = launch("--shutdown-timeout", "15").ready()
    request = engine.start(1, 150)
    eventually(lambda: engine.counts()[0] == 1, "it runs")
    engine.process.send_signal(signal.SIGTERM)
    assert finished(request).json["usage"]["completion_tokens"] == 150
    assert engine.wait() == 0


def test_sigterm_to_the_session(launch: Launch) -> None:
    engine = launch().ready()
    os.killpg(engine.process.pid, signal.SIGTERM)
    assert engine.wait() == 0
    assert not engine.segment_path.exists()


def test_sigterm_to_the_core_alone_ends_both(launch: Launch) -> None:
    engine = launch().ready()
    os.kill(engine.core, signal.SIGTERM)
    assert engine.wait() == 0
    assert not engine.segment_path.exists()


def test_sigkill_of_all_leaves_the_segment_too(launch: Launch, gpu_dir: Path) -> None:
    engine = launch().ready()
    engine.kill_session()
    assert engine.segment() == (CAPACITY, BUNDLE, 5 * BUNDLE)
    assert engine.uds.exists()
    assert engine.worker_folder.exists()
    assert used_bytes(gpu_dir) == BASE


def test_sigkill_of_the_api_server_orphans_the_core_with_its_memory(launch: Launch, gpu_dir: Path) -> None:
    engine = launch().ready()
    core, held = engine.core, used_bytes(gpu_dir)
    engine.process.kill()
    engine.wait()
    with pytest.raises(ConnectionRefusedError):
        engine.get("/health")
    assert holds(lambda: engine.session() == [core] and used_bytes(gpu_dir) == held)
    os.kill(core, signal.SIGTERM)
    eventually(lambda: not engine.session(), "the core ends in order")
    assert not engine.segment_path.exists()


def test_ignore_sigterm(launch: Launch) -> None:
    engine = launch(SIM_FAULT="ignore_sigterm").ready()
    os.killpg(engine.process.pid, signal.SIGTERM)
    assert holds(lambda: engine.get("/health").status == 200)
    assert len(engine.session()) == 2


def test_orphan_core(launch: Launch) -> None:
    engine = launch(SIM_FAULT="orphan_core").ready()
    core = engine.core
    os.killpg(engine.process.pid, signal.SIGTERM)
    assert engine.wait() == -signal.SIGKILL
    assert holds(lambda: engine.session() == [core])


# A core that dies or hangs


def test_a_dying_core_fails_its_requests_and_the_server_ends_with_status_zero(launch: Launch, gpu_dir: Path) -> None:
    engine = launch(SIM_CORE_WATCHDOG_S="3").ready()
    assert engine.post("/sim/fault", {"set": "die_after:2"}).json == {"faults": {"die_after": 2.0}}
    stream = engine.start(1, 5000, stream=True)
    eventually(lambda: engine.counts() == (1, 0), "the stream runs")
    whole = engine.start(1, 5000)
    reply = finished(whole)
    assert (reply.status, reply.json["error"]["type"]) == (500, "InternalServerError")
    assert finished(stream).text.strip().splitlines()[-1].startswith('data: {"error":')
    assert engine.get("/health").status == 503
    assert engine.complete().status == 500
    assert engine.wait() == 0
    assert used_bytes(gpu_dir) == BASE
    assert not engine.segment_path.exists()


def test_a_hanging_core_looks_healthy(launch: Launch) -> None:
    engine = launch().ready()
    engine.post("/sim/fault", {"set": "hang_after:1"})
    request = engine.start(1, 20)
    eventually(lambda: engine.metric("generation_tokens_total") == 2, "two tokens")
    status = engine.open("/collective_rpc", {"method": "kv_status"})
    assert holds(lambda: engine.metric("generation_tokens_total") == 2)
    assert engine.get("/health").status == 200
    assert engine.counts() == (1, 0)
    engine.post("/sim/fault", {"set": ""})
    assert finished(request).json["usage"]["completion_tokens"] == 20
    assert finished(status).status == 200


def test_a_core_hangs_at_once_also_where_a_step_is_due(launch: Launch) -> None:
    engine = launch(SIM_STEP_S="0").ready()  # one is always due
    request = engine.start(1, 7000)
    eventually(lambda: engine.metric("generation_tokens_total") > 0, "it runs")
    engine.post("/sim/fault", {"set": "hang_after:0"})
    made = engine.metric("generation_tokens_total")
    assert 0 < made < 7000
    assert holds(lambda: engine.metric("generation_tokens_total") == made)
    engine.post("/sim/fault", {"set": ""})
    assert finished(request).json["usage"]["completion_tokens"] == 7000


def test_other_faults(launch: Launch) -> None:
    engine = launch(SIM_FAULT="error_500").ready()
    assert engine.complete().status == 500
    assert engine.post("/sim/fault", {"set": "slow_step:0.1"}).status == 200
    began = time.monotonic()
    assert engine.complete(max_tokens=4).status == 200
    assert time.monotonic() - began > 0.25
    assert engine.post("/sim/fault", {"set": "bogus"}).status == 400


# Sleep


def test_sleep_and_wake(launch: Launch, gpu_dir: Path) -> None:
    engine = launch("--enable-sleep-mode").ready()
    engine.rpc("kv_empty_cache")
    engine.complete(4 * TOKENS_PER_PAGE)

    def besides_kv() -> int:  # the reserve is refilled in the background, whenever that comes to its turn
        return used_bytes(gpu_dir) - sum(engine.segment()[1:])

    before = besides_kv()
    interrupted = engine.start(1, 20_000)
    eventually(lambda: engine.counts() == (1, 0), "it runs")
    assert engine.post("/sleep?level=1").status == 200
    assert finished(interrupted).json["choices"][0]["finish_reason"] == "abort"
    assert engine.get("/is_sleeping").json == {"is_sleeping": True}
    assert engine.segment()[1] == BUNDLE
    eventually(lambda: besides_kv() <= before - WEIGHTS, "the weights are given back")
    request = engine.start(1, 1)
    eventually(lambda: engine.counts() == (0, 1), "the request queues")
    assert engine.get("/health").status == 200
    assert holds(lambda: engine.counts() == (0, 1), 0.1)
    assert engine.post("/wake_up").status == 200
    assert finished(request).status == 200
    assert engine.get("/is_sleeping").json == {"is_sleeping": False}


def test_a_wake_without_memory_fails_and_can_be_tried_again(launch: Launch, ballast: Ballast, gpu_dir: Path) -> None:
    engine = launch("--enable-sleep-mode").ready()
    engine.post("/sleep")
    foreign = ballast(10240 * MIB - used_bytes(gpu_dir) - WEIGHTS + 1)
    reply = engine.post("/wake_up")
    assert reply.status == 500
    assert "out of memory" in reply.text
    foreign.close()
    assert engine.post("/wake_up").status == 200
    assert engine.complete().status == 200


def test_sleep_without_sleep_mode_frees_nothing(launch: Launch, gpu_dir: Path) -> None:
    engine = launch().ready()
    before = used_bytes(gpu_dir)
    assert engine.post("/sleep?level=1").status == 200
    assert used_bytes(gpu_dir) == before


def test_wake_oom(launch: Launch) -> None:
    engine = launch("--enable-sleep-mode", SIM_FAULT="wake_oom").ready()
    engine.post("/sleep")
    assert engine.post("/wake_up").status == 500
    assert engine.get("/is_sleeping").json == {"is_sleeping": True}


def test_a_failed_sleep_is_fatal_after_wake(launch: Launch) -> None:
    engine = launch("--enable-sleep-mode", SIM_FAULT="sleep_500").ready()
    assert engine.post("/sleep").status == 500
    assert engine.get("/is_sleeping").json == {"is_sleeping": True}
    assert engine.post("/wake_up").status == 200
    assert engine.complete().status == 500
    assert engine.wait() == 0
    assert "an illegal memory access was encountered" in engine.log


def test_development_routes_need_development_mode(launch: Launch) -> None:
    engine = launch(VLLM_SERVER_DEV_MODE="0").ready()
    paths = ("/sleep", "/wake_up", "/reset_prefix_cache", "/collective_rpc", "/sim/fault")
    assert {engine.post(path).status for path in paths} == {404}
    assert engine.get("/is_sleeping").status == 404


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(launch: Launch, stream: bool) -> None:
    engine = launch().ready()
    running = engine.start(1, 20_000, stream=stream)
    eventually(lambda: engine.counts() == (1, 0), "it runs")
    running.close()
    eventually(lambda: engine.counts() == (0, 0), "it is gone")
    engine.set_total(2 * BUNDLE)
    engine.poke_until(lambda: engine.rpc("kv_status")["limit_bytes"] == 2 * BUNDLE, "the limit is applied")
    waiting = engine.start(5 * TOKENS_PER_PAGE, 1, stream=stream)
    eventually(lambda: engine.counts() == (0, 1), "it waits, and makes no tokens")
    waiting.close()
    eventually(lambda: engine.counts() == (0, 0), "it is gone, too")


def test_aborts_count_as_such(launch: Launch) -> None:
    engine: Engine = launch().ready()
    engine.start(1, 20_000).close()
    label = 'finished_reason="abort"} 1.0'
    eventually(lambda: label in engine.get("/metrics").text, "an abort is counted")
