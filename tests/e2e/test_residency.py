"""Who is on a GPU, seen from outside: idle models sleep and wake, make room for others, and whoever is asked for is answered.

Real daemon, real processes, simulated engines. What sleeps or stops is seen in the GPU's own bytes, not only in the daemon's words.
"""

import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from tests.e2e.conftest import Client, Fresh
from tests.e2e.running import DEADLINE_S, Daemon, eventually

GIB = 1 << 30
WEIGHTS = 8 * GIB - GIB // 8  # of the large model, a little less
CARD = "24GiB"  # two of it fit, three do not


def register(daemon: Daemon, *models: str, large: bool = False, **fields: Any) -> list[str]:
    """Known models that nobody has asked for; they may go for others at once."""
    names = [daemon.name(model) for model in models]
    source = daemon.large_folder if large else daemon.model_folder
    for name in names:
        daemon.post("/models?start=false", {"name": name, "source": str(source), "min_residency": "0.1s", **fields})
    return names


def rested(daemon: Daemon, name: str) -> None:
    """Its last request is over in the daemon's eyes too: a look of the loop has seen it."""
    eventually(lambda: daemon.model(name)["in_flight"] == 0, f"{name} has no request")


def answer(client: openai.OpenAI, name: str, tokens: int = 3) -> str:
    return client.completions.create(model=name, prompt="x", max_tokens=tokens).choices[0].text


def asleep(daemon: Daemon, client: openai.OpenAI, *names: str) -> None:
    """They were used, and sleep now."""
    for name in names:
        assert answer(client, name).startswith(name)
        rested(daemon, name)
        daemon.tell(name, "sleep")
    for name in names:
        daemon.until_state(name, "asleep")


def ends(daemon: Daemon) -> None:
    """In order, whoever sleeps, wakes or waits; and nothing is left."""
    assert daemon.get("/status")["loop"]["errors"] == 0
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert daemon.remains() == {}


def kinds(daemon: Daemon, name: str) -> list[str]:
    return [event["kind"] for event in daemon.model(name)["events"]]


def reasons(daemon: Daemon, name: str) -> str:
    return "; ".join(event["reason"] for event in daemon.model(name)["events"])


# ---- sleep and wake -------------------------------------------------------------------------------------------------


def test_an_idle_model_sleeps_and_a_request_wakes_it(daemon: Daemon, client: Client) -> None:
    (name,) = register(daemon, "sleepy", large=True, sleep_timeout="1s")
    assert answer(client(daemon), name).startswith(name)
    engine, awake = daemon.model(name)["engine"], daemon.held_bytes()
    daemon.until_state(name, "asleep")
    assert daemon.held_bytes() < awake - WEIGHTS
    assert answer(client(daemon), name).startswith(name)
    again = daemon.until_state(name, "ready", "asleep", "draining")
    assert (again["engine"]["pid"], again["engine"]["launch_id"]) == (engine["pid"], engine["launch_id"])
    assert [kind for kind in kinds(daemon, name) if kind in ("starting", "asleep", "waking")][:3] == ["starting", "asleep", "waking"]
    assert daemon.ctl("rm", name).returncode == 0
    assert daemon.remains() == {}


def test_an_operator_puts_a_model_to_sleep_wakes_it_and_unloads_it(daemon: Daemon, client: Client) -> None:
    (name,) = register(daemon, "by-hand", large=True)
    status, error = daemon.refusal("POST", f"/models/{name}/sleep")
    assert (status, error["code"]) == (409, "conflict")
    asleep(daemon, client(daemon), name)
    dozing = daemon.held_bytes()
    daemon.tell(name, "wake")
    daemon.until_state(name, "ready")
    assert daemon.held_bytes() > dozing + WEIGHTS
    daemon.tell(name, "unload")
    daemon.until_state(name, "stopped")
    assert daemon.remains() == {}
    assert answer(client(daemon), name).startswith(name)
    assert kinds(daemon, name).count("starting") == 2
    assert daemon.ctl("rm", name).returncode == 0


def test_a_busy_model_is_neither_put_to_sleep_nor_unloaded_and_drains_whole(daemon: Daemon, client: Client) -> None:
    (name,) = register(daemon, "busy")
    with client(daemon).completions.create(model=name, prompt="x", max_tokens=200, stream=True) as chunks:
        texts = [next(iter(chunks)).choices[0].text]
        with daemon.engines_held():
            for verb in ("sleep", "unload"):
                status, error = daemon.refusal("POST", f"/models/{name}/{verb}")
                assert (status, error["code"]) == (409, "busy")
                assert f"orchestratorctl drain {name}" in error["message"]
            daemon.tell(name, "drain")
            daemon.until_state(name, "draining")
            assert daemon.engine_processes(), "the engine was ended under a request"
        texts += [chunk.choices[0].text for chunk in chunks]
    assert len("".join(texts).split()) == 201  # its name, then a word a token
    daemon.until_state(name, "stopped")
    assert daemon.remains() == {}
    assert answer(client(daemon), name).startswith(name)
    assert daemon.ctl("rm", name).returncode == 0


def test_a_daemon_that_is_killed_leaves_sleepers_asleep_to_the_next_one(fresh: Fresh, client: Client) -> None:
    daemon = fresh().start()
    (name,) = register(daemon, "sleeper", large=True)
    asleep(daemon, client(daemon), name)
    engine, dozing = daemon.model(name)["engine"], daemon.held_bytes()
    daemon.kill()
    daemon.start()
    found = daemon.until_state(name, "asleep")
    assert (found["engine"]["pid"], found["engine"]["launch_id"]) == (engine["pid"], engine["launch_id"])
    assert daemon.held_bytes() == dozing
    assert answer(client(daemon), name).startswith(name)
    assert daemon.held_bytes() > dozing + WEIGHTS
    assert kinds(daemon, name).count("starting") == 1
    ends(daemon)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_an_engine_that_can_not_fall_asleep_is_replaced(daemon: Daemon, client: Client) -> None:
    (name,) = register(daemon, "insomniac", env={"SIM_FAULT": "sleep_500"})
    assert answer(client(daemon), name).startswith(name)
    first = daemon.model(name)["engine"]["launch_id"]
    rested(daemon, name)
    daemon.tell(name, "sleep")
    daemon.until_state(name, "stopped", "backoff")
    assert "it did not go to sleep: /sleep answered 500" in reasons(daemon, name)
    assert answer(client(daemon), name).startswith(name)
    assert daemon.model(name)["engine"]["launch_id"] != first
    assert daemon.ctl("rm", name).returncode == 0
    assert daemon.remains() == {}


def test_a_request_whose_model_dies_in_waking_waits_for_the_next_start(daemon: Daemon, client: Client) -> None:
    (name,) = register(daemon, "undead", env={"SIM_FAULT": "wake_oom"})
    asleep(daemon, client(daemon), name)
    assert answer(client(daemon), name).startswith(name)
    assert "it did not wake: /wake_up answered 500" in reasons(daemon, name)
    seen = kinds(daemon, name)
    assert [kind for kind in seen[seen.index("waking") :] if kind in ("backoff", "starting", "ready")] == ["backoff", "starting", "ready"]
    assert daemon.ctl("rm", name).returncode == 0
    assert daemon.remains() == {}


def test_weights_that_are_gone_when_they_are_needed(daemon: Daemon, client: Client) -> None:
    folder = daemon.folder / "moved"
    shutil.copytree(daemon.model_folder, folder)
    (name,) = register(daemon, "moved", source=str(folder))
    shutil.rmtree(folder)
    daemon.tell(name, "load")
    failed = daemon.until_state(name, "failed", "backoff")
    assert str(folder) in "\n".join(failed["failure"]["log"]), failed
    assert str(folder) in daemon.ctl("describe", name).stdout
    shutil.copytree(daemon.model_folder, folder)
    daemon.tell(name, "load")
    assert answer(client(daemon), name).startswith(name)
    assert daemon.ctl("rm", name).returncode == 0
    assert daemon.remains() == {}


def test_a_start_that_never_ends_is_given_up_with_its_last_words(daemon: Daemon) -> None:
    (name,) = register(daemon, "never", start_timeout="1s", env={"SIM_FAULT": "hang_at_start"})
    daemon.tell(name, "load")
    model = daemon.until_state(name, "backoff")
    assert "not ready after 1s (start_timeout); it was at: profiling memory" in model["failure"]["reason"]
    assert any("Model loading took" in line for line in model["failure"]["log"])
    shown = daemon.ctl("describe", name).stdout
    assert "start_timeout" in shown
    assert "Model loading took" in shown
    assert daemon.ctl("rm", name).returncode == 0
    assert daemon.remains() == {}


# ---- one card for many ----------------------------------------------------------------------------------------------


def test_three_models_on_a_card_for_two_are_all_answered_in_turn(fresh: Fresh, client: Client) -> None:
    daemon = fresh(ORCH_GPUS__SIMULATED__MEMORY=CARD).start()
    names = register(daemon, "a", "b", "c", large=True)
    openai_client = client(daemon)
    for name in (*names, *names):
        assert answer(openai_client, name).startswith(name)
    made_room = [event for name in names for event in daemon.model(name)["events"] if "makes room for" in event["reason"]]
    assert {event["kind"] for event in made_room} >= {"draining"}
    assert not {"backoff", "failed"} & {kind for name in names for kind in kinds(daemon, name)}
    ends(daemon)


def test_a_model_that_can_not_fit_is_refused_or_waits_with_the_reason(fresh: Fresh, client: Client) -> None:
    daemon = fresh(ORCH_GPUS__SIMULATED__MEMORY=CARD).start()
    status, error = daemon.refusal(
        "POST", "/models", {"name": daemon.name("huge"), "source": str(daemon.large_folder), "kv_floor": "30GiB"}
    )
    assert (status, error["code"]) == (422, "invalid_spec")
    assert "can never fit: it needs" in str(error)
    kept = register(daemon, "kept", "kept-too", large=True, pinned=True)
    for name in kept:
        assert answer(client(daemon), name).startswith(name)
    (late,) = register(daemon, "late", large=True)
    plan = daemon.get(f"/models/{late}/plan")
    assert (plan["fits"], plan["steps"]) == ("later", [])
    daemon.tell(late, "load")
    waiting = daemon.until_state(late, "waiting")
    for why in (plan["why"], waiting["reason"]):
        assert "are missing" in why
        assert all(f"{name} is pinned" in why for name in kept)
    daemon.tell(kept[0], "unpin")
    daemon.until_state(late, "ready")
    assert f"makes room for {late}" in reasons(daemon, kept[0])
    assert "makes room" not in reasons(daemon, kept[1])
    ends(daemon)


def test_sleepers_over_the_hosts_budget_the_cheapest_is_stopped(fresh: Fresh, client: Client) -> None:
    daemon = fresh(ORCH_MEMORY__SLEEPERS="12GiB").start()
    seldom, often = register(daemon, "seldom", "often", large=True)
    openai_client = client(daemon)
    asleep(daemon, openai_client, seldom)
    for _ in range(5):
        assert answer(openai_client, often).startswith(often)
    asleep(daemon, openai_client, often)
    daemon.until_state(seldom, "stopped")
    assert "sleepers are over the host's budget" in reasons(daemon, seldom)
    assert daemon.model(often)["state"] == "asleep"
    for name in (often, seldom):
        assert answer(openai_client, name).startswith(name)
    assert kinds(daemon, often).count("starting") == 1
    ends(daemon)


def test_two_models_that_are_never_idle_take_turns_on_one_card(fresh: Fresh, client: Client) -> None:
    # A turn is half a minute at least, which is what users are to wait and no test is.
    turn = "from orchestrator.policy import resident; resident.LEAST_TURN_S = 1.5"
    daemon = fresh(turn, ORCH_GPUS__SIMULATED__MEMORY="14GiB").start()
    names = register(daemon, "one", "two", large=True, args=["--enforce-eager"])
    openai_client = client(daemon)
    over = threading.Event()
    waits: list[float] = []

    def ask(name: str, tokens: int) -> int:
        count = 0
        while not over.is_set():
            began = time.monotonic()
            assert answer(openai_client, name, tokens).startswith(name)
            waits.append(time.monotonic() - began)
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:  # three clients each, out of step: somebody always runs or waits
        asking = [(name, pool.submit(ask, name, tokens)) for name in names for tokens in (17, 29, 43)]
        try:
            eventually(lambda: all(kinds(daemon, name).count("ready") >= 2 for name in names), "both had two turns")
        finally:
            over.set()
        answered: Counter[str] = Counter()
        for name, count in asking:
            answered[name] += count.result()
    assert min(answered.values()) >= 6
    assert max(waits) < DEADLINE_S / 2
    assert any("its turn is over" in reasons(daemon, name) for name in names)
    ends(daemon)
