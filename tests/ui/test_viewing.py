"""What the page asks, without a browser: who may look, what pages of other sites may not, and how it ends."""

import asyncio
import contextlib
import http.client
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from starlette.types import Message

from orchestrator.api import viewing
from orchestrator.api.connection import CLIENT
from tests.e2e.conftest import Fresh
from tests.e2e.running import DEADLINE_S, Daemon

FOLDER = Path(__file__).parents[2] / "orchestrator/api/ui"
LOOKS = {"Sec-Fetch-Site": "same-origin"}
pytestmark = pytest.mark.xdist_group("ui")


@contextlib.contextmanager
def asked(url: str, path: str, method: str = "GET", **headers: str) -> Iterator[http.client.HTTPResponse]:
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=DEADLINE_S)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        yield connection.getresponse()


def status(url: str, path: str, method: str = "GET", **headers: str) -> int:
    with asked(url, path, method, **headers) as answer:
        return answer.status


def test_the_files_are_walled_in_and_kept_until_they_change(daemon: Daemon, url: str) -> None:
    public = daemon.get("/status")["listen"]
    for at in (url, public):
        with asked(at, "/ui") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["X-Frame-Options"] == "DENY"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            etag = answer.headers["ETag"]
        assert status(at, "/ui", If_None_Match=etag) == 304
        for path in FOLDER.iterdir():
            assert status(at, f"/ui/{path.name}") == 200, path.name
        assert status(at, "/ui/..%2fpage.py") == 404


def test_the_page_has_no_script_of_its_own_inside_and_no_markup_from_texts() -> None:
    index = (FOLDER / "index.html").read_text()
    assert "://" not in index
    assert " style=" not in index
    assert " on" + "click" not in index
    ours = [path for path in FOLDER.glob("*.js") if path.name != "uplot.js"]
    assert len(ours) > 8
    for path in ours:
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert way not in path.read_text(), f"{path.name}: {way}"


FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "same-origin", "Host": "evil.example"},
    {"Origin": "http://evil.example:8001", "Host": "evil.example:8001"},
    {"Origin": "http://127.0.0.1.evil.example", "Host": "127.0.0.1.evil.example"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_site_may_nothing(daemon: Daemon, url: str, headers: dict[str, str]) -> None:
    name = daemon.name("one")
    public = daemon.get("/status")["listen"]
    for at, method, path in (
        (url, "POST", f"/api/v1/models/{name}/sleep"),
        (url, "DELETE", f"/api/v1/models/{name}"),
        (url, "POST", "/api/v1/models"),
        (url, "POST", "/v1/chat/completions"),
        (url, "GET", "/api/v1/status"),
        (url, "GET", "/ui/live"),
        (url, "GET", "/ui/history"),
        (url, "GET", "/metrics"),
        (public, "GET", "/ui/live"),
        (public, "GET", "/ui/history"),
    ):
        assert status(at, path, method, **headers) == 403, (path, headers)
    assert daemon.model(name)["state"] == "ready"


def test_our_own_page_and_programs_may(daemon: Daemon, url: str) -> None:
    host = urlsplit(url).netloc
    assert status(url, "/api/v1/status") == 200
    assert status(url, "/api/v1/status", Host="anything.example") == 200, "no browser"
    assert status(url, "/api/v1/status", Sec_Fetch_Site="same-origin", Origin=url) == 200
    for local in (host, "localhost:8001", "[::1]:8001"):
        pinned = status(
            url, f"/api/v1/models/{daemon.name('one')}/unpin", "POST", Sec_Fetch_Site="same-origin", Host=local, Origin=f"http://{local}"
        )
        assert pinned == 202


def test_a_page_that_is_one_too_many_is_told_so_and_a_place_comes_back(daemon: Daemon, url: str) -> None:
    with contextlib.ExitStack() as open_ones:
        for _ in range(32):
            answer = open_ones.enter_context(asked(url, "/ui/live"))
            assert answer.status == 200
            answer.readline()
        with asked(url, "/ui/live") as refused:
            assert refused.status == 503
            assert refused.headers["Retry-After"] == "5"
            assert json.loads(refused.read())["error"]["code"] == "busy"
    for _ in range(200):
        if status(url, "/ui/live") == 200:
            break
    else:
        raise AssertionError("no place came back")


def test_a_viewer_that_takes_no_line_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewing, "STALLED_S", 0.01)
    counted: list[int] = []

    async def look() -> None:
        gone, never = asyncio.Event(), asyncio.Event()

        async def lines() -> AsyncIterator[bytes]:
            while True:
                yield b"{}"

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                await never.wait()

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "extensions": {CLIENT: SimpleNamespace(abort=gone.set)}}
        async with asyncio.timeout(DEADLINE_S):
            await viewing._Live(lines(), counted.append)(scope, receive, send)

    asyncio.run(look())
    assert counted == [1, -1]


def test_a_viewer_hears_each_change_and_no_clock_that_ticks(daemon: Daemon, url: str) -> None:
    with asked(url, "/ui/live") as answer:
        first = json.loads(answer.readline())
        assert {model["name"] for model in first["models"]} == {daemon.name("one"), daemon.name("two")}
        assert first["operator"] is True
        assert any(json.loads(answer.readline())["models"] == [] for _ in range(8)), "a limit may move, but not each second"
        daemon.tell(daemon.name("one"), "pin")
        lines = (json.loads(line) for line in answer)
        told = next(line for line in lines if any(model["pinned"] for model in line["models"]))
        assert [model["name"] for model in told["models"] if model["pinned"]] == [daemon.name("one")]
        assert ("pin", daemon.name("one")) in [(event["kind"], event["model"]) for event in told["events"]]
        daemon.tell(daemon.name("one"), "unpin")


def test_a_key_that_is_revoked_ends_its_view(fresh: Fresh) -> None:
    daemon = fresh().start()
    key = json.loads(daemon.ctl("keys", "create", "alice", "--json").stdout)["key"]
    url = daemon.get("/status")["listen"]
    assert status(url, "/ui/live") == 401
    with asked(url, "/ui/live", Authorization=f"Bearer {key}") as answer:
        assert json.loads(answer.readline())["operator"] is False
        daemon.ctl("keys", "revoke", "alice")
        *_, last = (json.loads(line) for line in answer)
        assert last["error"]["code"] == "invalid_api_key"


def test_an_open_page_does_not_hold_up_a_daemon_that_stops(fresh: Fresh) -> None:
    daemon = fresh(ORCH_ADMIN__TCP="true", ORCH_ADMIN__KEY="k" * 24).start()
    url = daemon.get("/status")["listen"]
    with asked(url, "/ui/live", Authorization="Bearer " + "k" * 24) as answer:
        assert json.loads(answer.readline())["operator"] is True
        daemon.signal(signal.SIGTERM)
        answer.read()  # an end that is in order: IncompleteRead otherwise
        assert daemon.wait() == 0
