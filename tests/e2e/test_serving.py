"""Models of one source side by side, through the real command, the real daemon and the official client."""

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import Client
from tests.e2e.running import Daemon, eventually

ASK: list[openai.types.chat.ChatCompletionUserMessageParam] = [{"role": "user", "content": "Hello"}]


def plain(client: openai.OpenAI, model: str) -> str:
    return client.chat.completions.create(model=model, messages=ASK, max_tokens=20).choices[0].message.content or ""


def streamed(client: openai.OpenAI, model: str) -> str:
    with client.chat.completions.create(model=model, messages=ASK, max_tokens=20, stream=True) as chunks:
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.fixture(scope="module")
def pair(daemon: Daemon) -> tuple[str, str]:
    a, b = daemon.name("a"), daemon.name("b")
    for name in (a, b):
        assert daemon.add(name)["state"] == "ready"
    return a, b


def test_two_models_of_one_source_answer_at_the_same_time_each_by_its_own_engine(
    daemon: Daemon, pair: tuple[str, str], client: Client
) -> None:
    openai_client = client(daemon)
    calls = [(ask, name) for name in pair for ask in (plain, streamed) for _ in range(4)]
    with ThreadPoolExecutor(len(calls)) as pool:
        texts = list(pool.map(lambda call: call[0](openai_client, call[1]), calls))
    for (_, name), text in zip(calls, texts, strict=True):
        assert text.startswith(name), "the wrong engine answered"
        assert text.endswith(" w20")
    assert {model.id for model in openai_client.models.list()} >= set(pair)
    assert openai_client.models.retrieve(pair[0]).id == pair[0]


def test_their_pools_are_their_own_and_together_fit_the_card(daemon: Daemon, pair: tuple[str, str]) -> None:
    models = [daemon.model(name) for name in pair]
    names = [model["engine"]["ipc_name"] for model in models]
    assert len(set(names)) == 2
    assert {path.name for path in daemon.segments()} == set(names)

    def sound() -> bool:
        limits = [struct.unpack("=q", Path("/dev/shm", name).read_bytes()[:8])[0] for name in names]
        (gpu,) = daemon.get("/status")["gpus"]
        room = gpu["total_bytes"] - gpu["reserve_bytes"] - gpu["fixed_bytes"] - gpu["foreign_bytes"]
        assert sum(limits) <= room
        # They get what the card has, too: 2 % are held back, and the dead band is 1 % of each ceiling.
        return all(limit > 0 for limit in limits) and sum(limits) > 0.9 * room

    eventually(sound, "the limits fill the card")


def test_ls_shows_them(daemon: Daemon, pair: tuple[str, str]) -> None:
    done = daemon.ctl("ls")
    assert done.returncode == 0
    for name in pair:
        (line,) = (line for line in done.stdout.splitlines() if name in line)
        assert "ready" in line


def test_a_request_wakes_a_model_that_was_never_started(daemon: Daemon, client: Client) -> None:
    name = daemon.name("asleep")
    assert daemon.add(name, "--no-start")["engine"] is None
    assert plain(client(daemon), name).startswith(name)
    assert daemon.ctl("rm", name).returncode == 0


def test_a_request_wakes_a_model_that_idled_out(daemon: Daemon, client: Client) -> None:
    name = daemon.name("idle")
    daemon.add(name, "--no-start", "--idle-timeout", "1s")
    for _ in range(2):
        assert plain(client(daemon), name).startswith(name)
        daemon.until_state(name, "stopped")
    kinds = [event["kind"] for event in daemon.model(name)["events"]]
    assert kinds.count("ready") == kinds.count("stopped") == 2
    assert daemon.ctl("rm", name).returncode == 0


def test_a_start_may_take_longer_than_the_idle_timeout(daemon: Daemon) -> None:
    name = daemon.name("slow")
    try:
        assert daemon.add(name, "--idle-timeout", "0.5s", "--env", "SIM_FAULT=slow_start:1.5")["state"] == "ready"
    finally:
        daemon.ctl("rm", name)


def test_a_model_that_an_operator_stopped_stays_down_until_start(daemon: Daemon, pair: tuple[str, str], client: Client) -> None:
    name = pair[1]
    assert daemon.ctl("stop", name).returncode == 0
    with pytest.raises(openai.InternalServerError) as refused:
        plain(client(daemon), name)
    assert (refused.value.status_code, refused.value.code) == (503, "model_stopped")
    assert plain(client(daemon), pair[0]).startswith(pair[0])
    assert daemon.ctl("start", name).returncode == 0
    assert plain(client(daemon), name).startswith(name)


def test_each_model_has_a_log_of_its_own(daemon: Daemon) -> None:
    names = [daemon.name("v2.5"), daemon.name("v2-5")]
    try:
        for name in names:
            daemon.add(name)
        for name in names:
            assert f"'{name}'" in daemon.ctl("logs", name).stdout
    finally:
        for name in names:
            daemon.ctl("rm", name)


def test_rm_leaves_nothing(daemon: Daemon, pair: tuple[str, str], client: Client) -> None:
    for name in pair:
        done = daemon.ctl("rm", name)
        assert (done.returncode, done.stdout) == (0, f"{name} is removed\n")
    assert daemon.remains() == {}
    assert daemon.get("/models") == {"models": []}
    with pytest.raises(openai.NotFoundError) as refused:
        plain(client(daemon), pair[0])
    assert refused.value.code == "model_not_found"
    assert daemon.ctl("describe", pair[0]).returncode == 4


def test_an_adapter_is_a_model_of_its_own_served_by_the_engine_of_its_base(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    base, sql, folder = daemon.name("base"), daemon.name("sql"), tmp_path / "sql"
    refused = daemon.ctl("add-model", base, str(daemon.model_folder), "--adapter", f"{sql}={folder}")
    assert refused.returncode != 0
    assert f"its adapter {sql!r}: there is no folder" in refused.stderr
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    daemon.add(base, "--adapter", f"{sql}={folder}")
    api = client(daemon)
    assert plain(api, sql)
    assert streamed(api, sql)
    listed = {model.id: model for model in api.models.list()}
    assert (listed[sql].to_dict()["parent"], "parent" in listed[base].to_dict()) == (base, False)
    assert api.models.retrieve(sql).id == sql
    assert len([model for model in daemon.get("/models")["models"] if model["name"] in (base, sql)]) == 1


def test_an_adapter_comes_and_goes_at_runtime_and_no_request_fails(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    base, late, folder = daemon.name("moving"), daemon.name("late"), tmp_path / "late"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    daemon.add(base)
    api = client(daemon)
    assert plain(api, base)
    said = daemon.ctl("adapt", base, "--add", f"{late}={folder}")
    assert (said.returncode, said.stdout.split()) == (0, [late, str(folder)]), said.stderr
    assert plain(api, late)  # it waits for the new engine
    assert daemon.ctl("adapt", base, "--rm", late).stdout == f"{base} has no adapters\n"
    assert plain(api, base)
    with pytest.raises(openai.NotFoundError):
        plain(api, late)
    refused = daemon.ctl("adapt", base, "--rm", late)
    assert refused.returncode != 0
    assert f"has no adapter {late!r}" in refused.stderr
