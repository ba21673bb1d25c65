"""Keys as users and operators meet them: the official client, the real daemon, real sockets, other users of this machine."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.e2e.conftest import Fresh
from tests.e2e.running import DEADLINE_S, Daemon, eventually
from tests.e2e.test_serving import ASK, plain

Made = Callable[..., openai.OpenAI]


def create(daemon: Daemon, name: str, *words: str) -> str:
    done = daemon.ctl("keys", "create", name, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sk-orch-")
    return done.stdout.strip()


@pytest.fixture
def user() -> Iterator[Made]:
    with contextlib.ExitStack() as stack:

        def made(daemon: Daemon, key: str, retries: int = 0) -> openai.OpenAI:
            return stack.enter_context(openai.OpenAI(base_url=daemon.url, api_key=key, max_retries=retries, timeout=DEADLINE_S))

        yield made


@pytest.fixture(scope="module")
def model(daemon: Daemon) -> str:
    name = daemon.name("m")
    daemon.add(name)
    daemon.add(daemon.name("other"), "--no-start")
    return name


def test_who_may_what(daemon: Daemon, model: str, user: Made) -> None:
    good, other = create(daemon, "may", "--model", model), daemon.name("other")
    assert plain(user(daemon, good), model).startswith(model)
    for wrong in ("none", good[:-1], good + "x"):
        with pytest.raises(openai.AuthenticationError) as refused:
            plain(user(daemon, wrong), model)
        assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError) as forbidden:
        plain(user(daemon, good), other)
    assert forbidden.value.code == "model_not_allowed"
    assert [found.id for found in user(daemon, good).models.list()] == [model]
    assert {found.id for found in user(daemon, create(daemon, "all")).models.list()} == {model, other}


def test_a_limit_says_when_to_come_back_and_who_does_is_served(daemon: Daemon, model: str, user: Made) -> None:
    key = create(daemon, "limited", "--rpm", "30")
    client = user(daemon, key)

    def until_refused() -> None:
        while True:  # thirty, and what is filled in meanwhile
            plain(client, model)

    with pytest.raises(openai.RateLimitError) as limited:
        until_refused()
    assert limited.value.code == "rate_limit_exceeded"
    assert limited.value.response.headers["retry-after"] in ("1", "2")
    assert plain(user(daemon, key, retries=1), model)  # the client itself waits as long as it is told, and comes once more


def test_a_revoked_key_is_refused_from_the_next_request_on(daemon: Daemon, model: str, user: Made) -> None:
    client = user(daemon, create(daemon, "gone"))
    with client.chat.completions.create(model=model, messages=ASK, max_tokens=40, stream=True) as chunks:
        first = next(iter(chunks))
        assert first.choices
        assert daemon.ctl("keys", "revoke", "gone").returncode == 0
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"  # what runs ends in order
    with pytest.raises(openai.AuthenticationError):
        plain(client, model)
    (line,) = (line for line in daemon.ctl("keys", "ls").stdout.splitlines() if line.startswith("gone "))
    assert line.split()[1] == "revoked"


def test_usage_is_to_the_token_what_the_answers_said(daemon: Daemon, model: str, user: Made) -> None:
    client = user(daemon, create(daemon, "counted"))
    said: Counter[str] = Counter()

    def ask(number: int) -> tuple[int, int]:
        """What one answer says that it used; of a stream that is not to say it, what the same question says elsewhere."""
        text, tokens = "x" * (number % 7 + 1), number % 5 + 1
        chat, streamed, told = number % 2 == 0, number % 4 < 2, number % 8 < 4
        make: Any = client.chat.completions.create if chat else client.completions.create
        asked: Any = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        options: Any = {"stream": True, **({"stream_options": {"include_usage": True}} if told else {})} if streamed else {}
        answer = make(model=model, max_tokens=tokens, **asked, **options)
        if not streamed:
            return answer.usage.prompt_tokens, answer.usage.completion_tokens
        last: Any = None
        with answer as chunks:
            for last in chunks:
                assert told or last.choices, "an event that was not asked for"
        if told:
            return last.usage.prompt_tokens, last.usage.completion_tokens
        again = make(model=model, max_tokens=tokens, **asked)
        return 2 * again.usage.prompt_tokens, 2 * again.usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        for prompt, completion in pool.map(ask, range(40)):
            said.update(prompt_tokens=prompt, completion_tokens=completion)
    twice = sum(1 for number in range(40) if number % 4 < 2 and number % 8 >= 4)
    found = json.loads(daemon.ctl("keys", "usage", "counted", "--json").stdout)["usage"]
    assert found == [{"key": "counted", "model": model, "requests": 40 + twice, **said}]


def test_keys_and_what_they_used_survive_a_kill(fresh: Fresh, user: Made) -> None:
    daemon = fresh().start()
    name = daemon.name("a")
    daemon.add(name)
    good, gone = create(daemon, "good"), create(daemon, "gone")
    for _ in range(3):
        plain(user(daemon, good), name)
    assert daemon.ctl("keys", "revoke", "gone").returncode == 0
    before = daemon.get("/keys/usage")["usage"]
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    daemon.start()
    daemon.until_state(name, "ready")
    assert daemon.get("/keys/usage")["usage"] == before
    assert plain(user(daemon, good), name)
    for key in (gone, "none"):
        with pytest.raises(openai.AuthenticationError):
            plain(user(daemon, key), name)
    daemon.signal(signal.SIGTERM)  # the end writes what no batch has written
    assert daemon.wait() == 0
    daemon.start()
    (row,) = daemon.get("/keys/usage")["usage"]
    assert row["requests"] == 4


# ---- where it is listened -----------------------------------------------------------------------------------------------------


def answers(daemon: Daemon, host: str) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, port(daemon)), timeout=DEADLINE_S):
        return True
    return False


def port(daemon: Daemon) -> int:
    return urlsplit(daemon.get("/status")["listen"]).port or 0


def models_status(daemon: Daemon, host: str) -> int:
    """What somebody without a key is answered there."""
    with contextlib.closing(http.client.HTTPConnection(host, port(daemon), timeout=DEADLINE_S)) as connection:
        connection.request("GET", "/v1/models")
        return connection.getresponse().status


def test_an_address_that_others_reach_is_listened_on_with_the_first_key_and_for_ever(fresh: Fresh) -> None:
    """127.0.0.2 stands for the others: a socket of 127.0.0.1 does not answer there, one of 0.0.0.0 does."""
    daemon = fresh(ORCH_LISTEN__HOST="0.0.0.0").start()
    assert "orchestratorctl keys create" in daemon.log.read_text()
    assert daemon.get("/status")["listen"].startswith("http://127.0.0.1:")
    assert (answers(daemon, "127.0.0.1"), answers(daemon, "127.0.0.2")) == (True, False)
    before = port(daemon)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", before, timeout=DEADLINE_S)) as kept:
        kept.request("GET", "/v1/models")
        assert kept.getresponse().read()
        held = kept.sock
        create(daemon, "first")
        assert port(daemon) == before
        assert daemon.get("/status")["listen"].startswith("http://0.0.0.0:")
        assert (answers(daemon, "127.0.0.1"), answers(daemon, "127.0.0.2")) == (True, True)
        kept.request("GET", "/v1/models")  # on the connection that there was
        assert kept.getresponse().status == 401
        assert kept.sock is held
    create(daemon, "second")
    for name in ("first", "second"):
        assert daemon.ctl("keys", "revoke", name).returncode == 0
    assert answers(daemon, "127.0.0.2")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    daemon.start()
    assert answers(daemon, "127.0.0.2")
    assert models_status(daemon, "127.0.0.2") == 401


def test_an_address_that_cannot_be_had_leaves_loopback(fresh: Fresh) -> None:
    daemon = fresh(ORCH_LISTEN__HOST="192.0.2.1").start()  # TEST-NET-1: nobody's
    create(daemon, "first")
    assert "not listening on 192.0.2.1: listen: 192.0.2.1:" in daemon.log.read_text()
    assert daemon.get("/status")["listen"].startswith("http://127.0.0.1:")
    assert models_status(daemon, "127.0.0.1") == 401


@pytest.mark.parametrize(("required", "status"), [("always", 401), ("never", 200)])
def test_with_keys_always_or_never_it_listens_as_it_is_told(fresh: Fresh, required: str, status: int) -> None:
    daemon = fresh(ORCH_LISTEN__HOST="0.0.0.0", ORCH_KEYS__REQUIRED=required).start()
    assert models_status(daemon, "127.0.0.2") == status
    create(daemon, "first")
    assert models_status(daemon, "127.0.0.2") == status


# ---- who may use the admin socket ---------------------------------------------------------------------------------------------

AS_ANOTHER = """
import http.client, os, socket, sys
path, groups = sys.argv[1], [int(word) for word in sys.argv[2:]]
connection = http.client.HTTPConnection("localhost", timeout=30)
connection.sock = socket.socket(socket.AF_UNIX)
os.setgroups(groups[1:])
os.setgid(groups[0])
os.setuid(65534)
connection.sock.connect(path)
connection.request("GET", "/api/v1/status")
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


def as_another(daemon: Daemon, *groups: int) -> tuple[int, str]:
    """What a user who is not root is answered; the first group is its own, the others are those that it was put in."""
    command = [sys.executable, "-c", AS_ANOTHER, str(daemon.admin), *map(str, groups)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    status, _, body = done.stdout.partition(" ")
    return int(status), body


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_admin_socket_is_for_root_and_the_group(fresh: Fresh) -> None:
    daemon = fresh(ORCH_ADMIN__GROUP="daemon")
    daemon.folder.chmod(0o755)
    daemon.start()
    group = 1  # of `daemon`, everywhere
    assert as_another(daemon, group)[0] == 200
    assert as_another(daemon, 65534, 5, group)[0] == 200
    for groups in ((65534,), (65534, 5, 6)):
        status, body = as_another(daemon, *groups)
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (403, "not_permitted")
        assert "members of the group 'daemon'" in error["message"]
        assert "usermod -aG daemon" in error["message"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_without_a_group_it_is_for_root_and_the_daemons_own_user(fresh: Fresh) -> None:
    daemon = fresh()
    daemon.folder.chmod(0o755)
    daemon.start()
    status, body = as_another(daemon, 65534)
    assert status == 403
    assert "admin.group" in json.loads(body)["error"]["message"]
    eventually(lambda: daemon.get("/status"), "root is let in")


def test_a_group_that_is_not_there_is_said_at_the_start(fresh: Fresh) -> None:
    daemon = fresh(ORCH_ADMIN__GROUP="no-such-group")
    command = [sys.executable, "-m", "orchestrator.daemon", "serve"]
    done = subprocess.run(command, env=daemon.env, cwd=daemon.folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    assert "admin.group: there is no group 'no-such-group' here: `sudo groupadd no-such-group` makes it" in done.stderr
