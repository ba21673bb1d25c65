"""What goes wrong, as an exit code, as words on stderr and as JSON on stdout."""

import json
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from orchestrator.cli import client as client_module
from orchestrator.cli import target
from orchestrator.cli.client import Client
from orchestrator.cli.exits import CliError
from orchestrator.cli.target import Target

from .conftest import Ctl
from .stub_daemon import Reply, StubDaemon, error


@pytest.mark.parametrize(
    ("status", "exit_code"),
    [(400, 78), (401, 5), (403, 5), (404, 4), (409, 1), (422, 78), (429, 75), (500, 1), (502, 1), (503, 75), (504, 1)],
)
def test_a_refusal_has_its_exit_code(daemon: StubDaemon, ctl: Ctl, status: int, exit_code: int) -> None:
    daemon.replies["GET", "/models/m"] = error(status, "no, because", "some_code")
    said = ctl("describe", "m", "--json")
    assert said.exit_code == exit_code
    assert "error: no, because" in said.stderr
    refusal = json.loads(said.stdout)["error"]
    assert (refusal["message"], refusal["code"], refusal["type"]) == (
        "no, because",
        "some_code",
        "invalid_request_error",
    )


def test_without_json_an_error_leaves_stdout_empty(daemon: StubDaemon, ctl: Ctl) -> None:
    said = ctl("describe", "m")
    assert (said.exit_code, said.stdout) == (4, "")
    assert "'m' does not exist" in said.stderr


def test_every_fault_of_a_spec_is_shown(daemon: StubDaemon, ctl: Ctl) -> None:
    problems = [
        {"field": "kv_floor", "message": "'3GB' is ambiguous"},
        {"field": "gpus", "message": "GPU 9 does not exist"},
    ]
    daemon.replies["POST", "/models"] = error(422, "kv_floor: ...; gpus: ...", "invalid_spec", errors=problems)
    said = ctl("add-model", "m", "org/m", "--kv-floor", "3GB", "--json")
    assert said.exit_code == 78
    assert "the daemon refused the spec: 2 problems\n  kv_floor: '3GB' is ambiguous\n  gpus: GPU 9 does not exist\n" in said.stderr
    assert json.loads(said.stdout)["error"]["errors"] == problems


def test_busy_says_when_to_come_back(daemon: StubDaemon, ctl: Ctl) -> None:
    reply = error(503, "shutting down")
    daemon.replies["GET", "/models"] = Reply(503, reply.body, {"Retry-After": "7"})
    said = ctl("ls")
    assert said.exit_code == 75
    assert "try again in 7s" in said.stderr


def test_no_key_says_how_to_give_one(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/models"] = error(401, "no valid admin key")
    assert "ORCH_ADMIN_KEY" in ctl("ls").stderr


@pytest.mark.parametrize(
    ("words", "env", "sent"),
    [
        (["ls"], {}, None),
        (["ls"], {"ORCH_ADMIN_KEY": "from-env"}, "Bearer from-env"),
        (["--admin-key", "before", "ls"], {"ORCH_ADMIN_KEY": "from-env"}, "Bearer before"),
        (["--admin-key", "before", "ls", "--admin-key", "after"], {}, "Bearer after"),
        (["ls", "--admin-key", "after"], {"ORCH_ADMIN_KEY": "from-env"}, "Bearer after"),
    ],
)
def test_the_admin_key(daemon: StubDaemon, ctl: Ctl, words: list[str], env: dict[str, str], sent: str | None) -> None:
    ctl(*words, **env)
    assert daemon.sent("GET").headers.get("Authorization") == sent


def test_a_broken_key_is_not_repeated(daemon: StubDaemon, ctl: Ctl) -> None:
    said = ctl("ls", ORCH_ADMIN_KEY="two\nlines")
    assert said.exit_code == 2
    assert "lines" not in said.stderr


@pytest.mark.parametrize(
    ("reply", "exit_code"),
    [
        (Reply(404, {"detail": "Not Found"}), 69),
        (Reply(404, b"<html>nginx</html>"), 69),
        (Reply(302, b"", {"Location": "/login"}), 69),
        (Reply(200, b"<html>hello</html>"), 69),
        (Reply(200, {"object": "list", "data": []}), 69),
        (Reply(404, {"error": {"message": "no route", "type": "t", "code": "route_not_found"}}), 69),
        (Reply(500, b"Internal Server Error"), 1),
        (Reply(503, b"upstream"), 75),
        (Reply(403, b"forbidden"), 5),
    ],
)
def test_something_else_answers(daemon: StubDaemon, ctl: Ctl, reply: Reply, exit_code: int) -> None:
    daemon.replies["GET", "/models"] = reply
    said = ctl("ls")
    assert said.exit_code == exit_code
    assert "error: " in said.stderr


def test_no_socket(ctl: Ctl, sock: str) -> None:
    said = ctl("ls", "--json")
    assert said.exit_code == 69
    assert sock in said.stderr
    assert "make run" in said.stderr
    assert json.loads(said.stdout)["error"]["code"] == "daemon_unreachable"


def test_a_socket_whose_daemon_died(ctl: Ctl, sock: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(sock)
    said = ctl("ls")
    assert said.exit_code == 69
    assert "nobody listens there" in said.stderr


def test_nothing_found_names_the_places(ctl: Ctl, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [f"{tmp_path}/a.sock", f"{tmp_path}/b.sock"]
    monkeypatch.setattr("orchestrator.cli.options.places", lambda environ: places)
    said = ctl("ls", ORCH_HOST="")
    assert said.exit_code == 69
    for each in (*places, "make run", "systemctl start orchestrator", "--host"):
        assert each in said.stderr


@pytest.fixture
def silent(sock: str) -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sock)
        listener.listen()
        yield sock


def test_a_daemon_that_hangs(silent: str, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ANSWER_S", 0.05)
    said = ctl("ls")
    assert said.exit_code == 69
    assert "no answer in time" in said.stderr


def test_timeout_counts_before_the_first_answer_too(silent: str, ctl: Ctl) -> None:
    assert ctl("start", "m", "--timeout", "0.05").exit_code == 124


def test_what_speaks_no_http(sock: str, ctl: Ctl) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sock)
        listener.listen()

        def greet() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

        greeter = threading.Thread(target=greet)
        greeter.start()
        said = ctl("ls")
        greeter.join()
    assert said.exit_code == 69
    assert "does not speak HTTP" in said.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become someone whom a folder shuts out")
def test_no_permission_names_the_group(daemon: StubDaemon, ctl: Ctl, sock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl("ls")  # imports what is imported late: the other user may not read this checkout
    import grp

    own = grp.getgrgid(os.stat(os.path.dirname(sock)).st_gid).gr_name
    monkeypatch.setattr("orchestrator.cli.options.places", lambda environ: [sock])
    os.chmod(os.path.dirname(sock), 0o700)
    os.seteuid(65534)
    try:
        named, found = ctl("ls"), ctl("ls", ORCH_HOST="")
    finally:
        os.seteuid(0)
    for said in (named, found):
        assert said.exit_code == 5
        assert f"belongs to group {own!r}" in said.stderr


def test_tcp(tcp_daemon: tuple[StubDaemon, str], ctl: Ctl) -> None:
    stub, address = tcp_daemon
    assert ctl("--host", address, "ls").exit_code == 0
    ctl("ls", "-H", f"{address}/behind/a/proxy/")
    assert [each.path for each in stub.requests] == ["/api/v1/models", "/behind/a/proxy/api/v1/models"]


def test_tcp_that_nobody_serves(ctl: Ctl) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can listen there meanwhile
        taken.bind(("127.0.0.1", 0))
        assert ctl("ls", "--host", f"http://127.0.0.1:{taken.getsockname()[1]}").exit_code == 69


@pytest.mark.parametrize(
    "text",
    [
        "gpu-box",
        "gpu-box:8000",
        "https://gpu-box:8000",
        "http://gpu-box",
        "http://:80",
        "http://a:b",
        "unix:rel",
        "http://a..b:1",
    ],
)
def test_an_address_that_is_none(ctl: Ctl, text: str) -> None:
    said = ctl("ls", "--host", text)
    assert said.exit_code == 2
    assert text in said.stderr


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("/run/a.sock", Target("/run/a.sock", socket="/run/a.sock")),
        ("./a.sock", Target("./a.sock", socket="./a.sock")),
        ("unix:///run/a.sock", Target("unix:///run/a.sock", socket="/run/a.sock")),
        ("unix:/run/a.sock", Target("unix:/run/a.sock", socket="/run/a.sock")),
        ("http://h:80", Target("http://h:80", host="h", port=80)),
        ("http://[::1]:80/p/", Target("http://[::1]:80/p/", host="::1", port=80, prefix="/p")),
    ],
)
def test_an_address(text: str, parsed: Target) -> None:
    assert target.parse(text) == parsed


def test_the_usual_places_in_order(tmp_path: object) -> None:
    uid = os.getuid()
    usual = ["/run/orchestrator/admin.sock", f"/tmp/orchestrator-{uid}/admin.sock"]
    assert target.places({}) == usual
    assert target.places({"XDG_RUNTIME_DIR": "/run/user/7"}) == ["/run/user/7/orchestrator/admin.sock", *usual]


def test_the_first_place_that_exists_is_taken(daemon: StubDaemon, sock: str) -> None:
    assert target.find(["/nonexistent/a.sock", sock, "/nonexistent/b.sock"]) == Target(sock, socket=sock)


def test_a_socket_path_that_is_too_long() -> None:
    with pytest.raises(CliError) as caught:
        Client(Target("x", socket="/" + "x" * 200)).get("/status")
    assert caught.value.exit_code == 69


def test_usage_errors_as_json(ctl: Ctl) -> None:
    said = ctl("ls", "--json", "--no-such")
    assert said.exit_code == 2
    assert json.loads(said.stdout)["error"]["code"] == "usage"
    assert "Usage: " in said.stderr
