"""SECURITY.md, held to: what another user of the box meets, where secrets are seen, what names and arguments may do, what fills a log."""

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from orchestrator import logs
from orchestrator.drivers.simgpu import SimGpus
from orchestrator.policy.units import GIB
from tests.e2e.conftest import Fresh, daemons
from tests.e2e.running import DEADLINE_S, ROOT, Daemon, eventually
from tests.e2e.test_nvml_process import FAKE

root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")

# ---- another user of the box ------------------------------------------------------------------------------------------------------

NOBODY = 65534
AS_NOBODY = """
import errno, fcntl, http.client, json, os, socket, sys
def read(path): open(path, "rb").read(1)
def write(path): open(path, "r+b")
def append(path): open(path, "ab")
def make(path): os.mkdir(path)
def names(path): os.listdir(path)
def unlink(path): os.unlink(path)
def lock(path): fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
def knock(path): socket.socket(socket.AF_UNIX).connect(path)
def end(pid): os.kill(int(pid), 15)
def ask(target):
    path, method, route = target.split(" ")
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    connection.request(method, route, "{}")
    status = connection.getresponse().status
    if status >= 400:
        raise OSError(errno.EACCES if status == 403 else errno.EINVAL, "")
tries, doings, found = json.load(sys.stdin), dict(globals()), []
"".encode("idna")  # what http.client loads late is loaded before this user can read no library any more
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for doing, target in tries:
    try:
        doings[doing](target)
        found.append("done")
    except OSError as error:
        found.append(errno.errorcode[error.errno])
print(json.dumps(found))
"""
SHUT = {"EACCES", "EPERM"}


class Try(NamedTuple):
    doing: str
    target: str


def as_nobody(*tries: Try) -> dict[Try, str]:
    """What becomes of each: `done`, or the kernel's word for why not; EACCES too where the daemon says 403."""
    command = [sys.executable, "-c", AS_NOBODY]
    done = subprocess.run(command, input=json.dumps(tries), capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(tries, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def box() -> Iterator[Daemon]:
    """Two models by a launch server, NVML's process, a key, and folders that every user may pass: what is shut is shut by itself."""
    with daemons() as make:
        engine = {"kind": "simulated", "launch_server": True}
        made = make(ORCH_GPUS__SOURCE="nvml", ORCH_ENGINES=json.dumps({"default": engine}))
        cards = made.folder / "r/simgpu"
        SimGpus(cards, 1, 24 * GIB)
        made.env |= {"PYTHONPATH": f"{FAKE}:{ROOT}", "FAKE_NVML": str(cards), "SIM_GPU_DIR": str(cards)}
        for folder in ("s", "s/logs"):
            (made.folder / folder).mkdir()
        for folder in (".", "s", "s/logs", "r"):
            (made.folder / folder).chmod(0o755)
        made.start()
        for name in ("a", "b"):
            made.add(made.name(name))
        assert made.ctl("keys", "create", "k").returncode == 0
        yield made


def everything(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


@root
def test_files_and_sockets_are_shut(box: Daemon) -> None:
    found = [path for folder in ("s", "r") for path in sorted((box.folder / folder).rglob("*")) if "simgpu" not in path.parts]
    sockets = [path for path in found if path.is_socket() and path != box.admin]
    files = [path for path in found if path.is_file()]
    assert {"state.db", "lock", "nvml.log", "launch-server-default.log"} <= {path.name for path in files}
    assert len([path for path in files if path.name.startswith(f"{box.prefix}-")]) == 2  # the engines' logs
    assert len([path for path in sockets if path.name == "api.sock"]) == 2
    tries = [Try(doing, str(path)) for path in files for doing in ("read", "write", "append", "lock", "unlink")]
    tries += [Try("knock", str(path)) for path in sockets]
    tries += [Try("names", str(box.folder / "r/engines"))]
    tries += [Try("make", str(box.folder / folder / "new")) for folder in ("r", "s", "s/logs")]
    assert {each: how for each, how in as_nobody(*tries).items() if how not in SHUT} == {}


@root
def test_the_admin_socket_takes_nobodys_word(box: Daemon) -> None:
    name = box.name("a")
    routes = ["GET /api/v1/status", "GET /api/v1/models", "GET /api/v1/events", "GET /api/v1/explain", "GET /api/v1/keys"]
    routes += ["POST /api/v1/models", "POST /api/v1/keys", "POST /api/v1/reload", "GET /api/v1/keys/usage"]
    routes += [f"GET /api/v1/models/{name}{of}" for of in ("", "/logs", "/watch", "/plan")]
    routes += [f"POST /api/v1/models/{name}/{verb}" for verb in ("stop", "unload", "limit", "adapters")]
    routes += [f"DELETE /api/v1/models/{name}", f"GET /upstream/{name}/metrics", f"POST /upstream/{name}/collective_rpc"]
    tries = [Try("ask", f"{box.admin} {route}") for route in routes]
    assert {each: how for each, how in as_nobody(*tries).items() if how != "EACCES"} == {}
    assert box.model(name)["state"] == "ready"


@root
def test_segments_can_be_neither_read_nor_changed_nor_locked_nor_removed(box: Daemon) -> None:
    """Whoever may read one may lock it, and kvcached waits for that lock for ever."""
    segments = box.segments()
    assert len(segments) == 2
    assert [oct(path.stat().st_mode & 0o777) for path in segments] == ["0o600"] * 2
    tries = [Try(doing, str(path)) for path in segments for doing in ("read", "write", "lock", "unlink")]
    assert {each: how for each, how in as_nobody(*tries).items() if how not in SHUT} == {}


@root
def test_processes_can_be_neither_looked_into_nor_signalled(box: Daemon) -> None:
    """The daemon, its launch server, NVML's process with its socket, the engines with theirs: what they hold open is reached by nobody."""
    assert box.process is not None
    processes = everything(psutil.Process(box.process.pid))
    lines = [" ".join(process.cmdline()) for process in processes]
    for program in ("launch_server.py", "nvml_reader.py", "api.sock"):
        assert any(program in line for line in lines), program
    tries = []
    for process in processes:
        proc = Path("/proc", str(process.pid))
        assert list((proc / "fd").iterdir())
        tries += [Try("end", str(process.pid)), Try("names", str(proc / "fd")), Try("read", str(proc / "fd/0"))]
        tries += [Try("read", str(proc / what)) for what in ("environ", "mem", "maps")]
    assert {each: how for each, how in as_nobody(*tries).items() if how not in SHUT} == {}


def test_only_the_front_door_is_a_port(box: Daemon) -> None:
    assert box.process is not None
    listening = set()
    for process in everything(psutil.Process(box.process.pid)):
        listening |= {(one.laddr.ip, one.laddr.port) for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}
    where = urlsplit(box.get("/status")["listen"])
    assert listening == {(where.hostname, where.port)}


def test_abstract_sockets_which_have_no_modes_are_none_of_ours(box: Daemon) -> None:
    assert box.process is not None
    held = {one.laddr for process in everything(psutil.Process(box.process.pid)) for one in process.net_connections("unix")}
    assert held
    assert [name for name in held if isinstance(name, str) and name.startswith(("@", "\0"))] == []


# ---- secrets ------------------------------------------------------------------------------------------------------------------------

ADMIN_KEY = "planted-admin-key-0123456789"
TOKEN = "hf_planted-of-the-environment-0123456789"
MODELS_TOKEN = "hf_planted-of-one-model-0123456789"
PASSWORD = "planted-password-0123456789"
WRONG = "sk-orch-planted-by-somebody-who-mistypes"


class Lines(threading.Thread):
    """All command lines of this machine, looked at all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    self.seen.add(path.read_bytes().decode(errors="replace"))


def test_secrets_are_seen_nowhere(fresh: Fresh) -> None:
    tcp = {"ORCH_ADMIN__TCP": "true", "ORCH_ADMIN__KEY": ADMIN_KEY, "ORCH_LOG__LEVEL": "debug", "ORCH_LOG__ACCESS": "true"}
    daemon = fresh(HF_TOKEN=TOKEN, **tcp)
    lines = Lines()
    lines.start()
    said: list[str] = []
    try:
        daemon.start()
        name = daemon.name("a")
        spec = {"name": name, "source": str(daemon.model_folder), "env": {"HF_TOKEN": MODELS_TOKEN, "DB_PASSWORD": PASSWORD}}
        daemon.post("/models", spec)
        daemon.until_state(name, "ready")
        secret = daemon.post("/keys", {"name": "k"})["key"]
        said += talk_with_all_of_it(daemon, name, secret)
        (engine,) = [one for one in daemon.engine_processes() if one.pid == daemon.model(name)["engine"]["pid"]]
        environ = engine.environ()
        assert environ["HF_TOKEN"] == MODELS_TOKEN
        assert [key for key in environ if key.startswith("ORCH_")] == []
        assert ADMIN_KEY not in str(environ)
        engine.kill()
        eventually(lambda: "SIGKILL" in str(daemon.model(name)["events"]), "it is said that it died")
        said += [json.dumps(daemon.get(path)) for path in ("/status", "/models", f"/models/{name}", "/events", "/explain", "/keys")]
        said += [json.dumps(daemon.get(path)) for path in ("/keys/usage", f"/models/{name}/plan")]
        for words in (("describe", name), ("ls",), ("ps",), ("status",), ("explain",), ("logs", name), ("keys", "ls"), ("keys", "usage")):
            done = daemon.ctl(*words)
            said += [done.stdout, done.stderr]
        said += [json.dumps(daemon.refusal("POST", "/models", {**spec, "name": "-"})[1])]
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    finally:
        lines.over.set()
        lines.join()
    logged = {path.name: path.read_text(errors="replace") for path in (daemon.log, *(daemon.folder / "s/logs").iterdir())}
    assert len(logged) >= 2  # the daemon's and an engine's; a second one's where it was started again by then
    state = b"".join(path.read_bytes() for path in (daemon.folder / "s").glob("state.db*"))
    assert hashlib.sha256(secret.encode()).digest() in state
    assert secret.encode() not in state
    assert any("--uds" in line and name in line for line in lines.seen), "engines' command lines were looked at"
    for planted in (ADMIN_KEY, TOKEN, MODELS_TOKEN, PASSWORD, WRONG, secret):
        assert [line for line in lines.seen if planted in line] == []
        assert [file for file, text in logged.items() if planted in text] == []
        assert [text for text in said if planted in text] == []


def talk_with_all_of_it(daemon: Daemon, name: str, secret: str) -> list[str]:
    """All that a client hears who sends its key in every way, the right one and a wrong one, the admin's too."""
    said: list[str] = []
    bodies: list[Any] = [{"model": name, "prompt": "x", "max_tokens": 2}, {"model": "none"}, {"model": name, "stream": True}, []]
    url = daemon.url.removesuffix("/v1")
    where = urlsplit(url)
    for key in (secret, WRONG, ADMIN_KEY):
        ways = ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}, {"Authorization": f"Basic {key}"}, {"Cookie": f"key={key}"})
        for headers in ways:
            with httpx2.Client(base_url=url, headers=headers, timeout=DEADLINE_S, trust_env=False) as client:
                for path in ("/v1/models", "/openapi.json", "/health", "/nowhere", "/api/v1/status", "/api/v1/models", "/docs"):
                    answer = client.get(path)
                    said.append(f"{answer.headers} {answer.text}")
                for body in bodies:
                    answer = client.post("/v1/completions", json=body)
                    said.append(f"{answer.headers} {answer.text}")
        head = f"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {key}\r\n"
        for raw in (head + "no header at all\r\n\r\n", head + f"Content-Length: {key}\r\n\r\n", key + "\r\n\r\n"):
            with socket.create_connection((str(where.hostname), where.port or 0), timeout=DEADLINE_S) as sock:
                sock.sendall(raw.encode())
                said.append(sock.recv(1 << 16).decode(errors="replace"))
        protocols = [Subprotocol("realtime"), Subprotocol(f"openai-insecure-api-key.{key}")]
        with (
            contextlib.suppress(InvalidStatus),
            connect(f"ws://{where.netloc}/v1/realtime?model={name}", subprotocols=protocols, proxy=None),
        ):
            pass
    return said


# ---- names, arguments and variables -------------------------------------------------------------------------------------------------

NAMES = [
    "", ".", "..", "../x", "a/../b", "a/./b", "a//b", "a/", "/etc/passwd", "-x", "--uds=/tmp/x", ".hidden", "_x", "a b", "a\nb", "a\n",
    "a\rb", "a\tb", "a\0b", "a\x1b[31mb", "a%2fb", "a;b", "a$(id)", "a`id`", "a|b", "a&b", "a'b", 'a"b', "a\\b", "a=b", "a{b}", "a,b",
    "ａ", "naïve", "a\u202eb", "a\u0000b", "😀", "a" * 129, "a/logs", "a/stop",
]  # fmt: skip
SOURCES = [
    "",
    "-x",
    "--trust-remote-code",
    "--config=/tmp/x",
    "a\0b",
    "/a\0b",
    "a\nb",
    "./x",
    "/nowhere/../..",
    "/etc/passwd",
]
ARGS = [
    ["--uds", "/tmp/x"], ["--uds=/tmp/x"], ["--ud", "/tmp/x"], ["--host", "0.0.0.0"], ["--hos=0.0.0.0"], ["--port", "1"], ["--port=1"],
    ["--por", "1"], ["--api-key", "x"], ["--api_key=x"], ["--root-path", "/x"], ["--config", "/tmp/x"], ["--conf=/tmp/x"],
    ["--model", "x"], ["--served-model-name", "x"], ["--served_model_name=x"], ["--ssl-keyfile", "x"], ["--ssl_certfile=x"],
    ["--api-server-count", "2"], ["--worker-extension-cls", "x.Y"], ["--kv-cache-memory-bytes", "1"], ["--gpu-memory-utilization=1"],
    ["--hf-token", "hf_x"], ["--hf_token=hf_x"], ["x"], ["--max-model-len\0"],
]  # fmt: skip
ENV = [
    {"KVCACHED_IPC_NAME": "x"}, {"ENABLE_KVCACHED": "false"}, {"KVCACHED_GPU_UTILIZATION": "1"}, {"CUDA_VISIBLE_DEVICES": "0"},
    {"VLLM_PORT": "1"}, {"VLLM_API_KEY": "x"}, {"VLLM_SERVER_DEV_MODE": "0"}, {"VLLM_RPC_BASE_PATH": "/tmp"}, {"": "x"}, {"A=B": "x"},
    {"A\0": "x"}, {"A\n": "x"}, {"A B": "x"}, {"1A": "x"}, {"A": "x\0y"}, {"A": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def untouched(daemon: Daemon) -> Iterator[Daemon]:
    """Afterwards nothing is registered, nothing runs, and no file is where there was none."""
    before = {str(path) for path in daemon.folder.rglob("*")}
    yield daemon
    assert daemon.get("/models")["models"] == []
    assert daemon.get("/keys")["keys"] == []
    assert daemon.remains() == {}
    new = {str(path) for path in daemon.folder.rglob("*")} - before
    assert [path for path in new if not path.endswith(("-wal", "-shm", ".log"))] == []
    assert "Traceback" not in daemon.log.read_text()


def fresh_name(daemon: Daemon) -> str:
    """So that nothing is refused for a name that is taken, where something was not refused that should have been."""
    return daemon.name(secrets.token_hex(3))


def refused(daemon: Daemon, path: str, given: dict[str, Any]) -> None:
    status, error = daemon.refusal("POST", path, given)
    assert status in (400, 422), (given, error)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_could_be_more_than_a_name_is_refused(untouched: Daemon, name: str) -> None:
    good = {"name": fresh_name(untouched), "source": str(untouched.model_folder)}
    refused(untouched, "/models?start=false", {**good, "name": name})
    refused(untouched, "/models?start=false", {**good, "aliases": [name]})
    refused(untouched, "/models?start=false", {**good, "adapters": {name: str(untouched.model_folder)}})
    refused(untouched, "/models?start=false", {**good, "engine": name})
    refused(untouched, "/models?start=false", {**good, "gpus": [name]})
    if name not in ("a/logs", "a/stop", "_x"):
        refused(untouched, "/keys", {"name": name})


@pytest.mark.parametrize("source", SOURCES, ids=ascii)
def test_a_source_that_is_no_source_is_refused(untouched: Daemon, source: str) -> None:
    refused(untouched, "/models?start=false", {"name": fresh_name(untouched), "source": source})


@pytest.mark.parametrize("args", ARGS, ids=ascii)
def test_arguments_of_the_daemons_own_are_refused(untouched: Daemon, args: list[str]) -> None:
    refused(untouched, "/models?start=false", {"name": fresh_name(untouched), "source": str(untouched.model_folder), "args": args})


@pytest.mark.parametrize("env", ENV, ids=ascii)
def test_variables_of_the_daemons_own_are_refused(untouched: Daemon, env: dict[str, Any]) -> None:
    refused(untouched, "/models?start=false", {"name": fresh_name(untouched), "source": str(untouched.model_folder), "env": env})


def test_what_operators_may_do_with_the_rights_of_the_service_user(fresh: Fresh) -> None:
    """They start programs as that user: a library to load, a path, remote code. It is theirs, and its engine's alone."""
    engines = json.dumps({"default": {"kind": "simulated", "launch_server": False}})  # of a forked one /proc shows no environment
    theirs = {"PYTHONSTARTUP": "/x", "LD_BIND_NOW": "1", "VLLM_PORT": "1", "KVCACHED_IPC_NAME": "theirs"}
    daemon = fresh(ORCH_ENGINES=engines, **theirs).start()
    marked, other = daemon.name("marked"), daemon.name("other")
    env = {"LD_LIBRARY_PATH": "/somewhere", "PYTHONHASHSEED": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
    daemon.post("/models", {"name": marked, "source": str(daemon.model_folder), "env": env, "args": ["--max-model-len", "4096"]})
    daemon.post("/models", {"name": other, "source": str(daemon.model_folder)})
    found = {}
    for name in (marked, other):
        engine = daemon.until_state(name, "ready")["engine"]
        found[name] = psutil.Process(engine["pid"]).environ()
        assert found[name]["KVCACHED_IPC_NAME"] == engine["ipc_name"]
        assert "LD_BIND_NOW" not in found[name]  # nothing of the daemon's environment but what engines need
        assert "VLLM_PORT" not in found[name]
        assert "PYTHONSTARTUP" not in found[name]
    assert env.items() <= found[marked].items()
    assert not env.keys() & found[other].keys()


def test_what_clients_say_makes_no_line_of_its_own_in_the_log(daemon: Daemon) -> None:
    forged = "x\n2030-01-01 00:00:00,000 ERROR forged"
    with httpx2.Client(base_url=daemon.url, timeout=DEADLINE_S, trust_env=False) as client:
        for model in (forged, "../" * 50, "-x", "\x1b]0;forged\x07"):
            assert client.post("/completions", json={"model": model, "prompt": "x"}).status_code == 404
            assert client.get("/models/x%0aforged").status_code == 404
    assert "forged" not in daemon.log.read_text()


# ---- a flood ------------------------------------------------------------------------------------------------------------------------


def test_who_says_nonsense_again_and_again_fills_no_log(fresh: Fresh) -> None:
    daemon = fresh().start()
    where = urlsplit(daemon.url)
    before = len(daemon.log.read_text().splitlines())
    for _ in range(500):
        with socket.create_connection((str(where.hostname), where.port or 0), timeout=DEADLINE_S) as sock:
            sock.sendall(b"nonsense\r\n\r\n")
            assert b"400" in sock.recv(100)
    lines = daemon.log.read_text().splitlines()[before:]
    assert 1 <= len(lines) <= logs.MOST
    assert "left out for up to a minute" in lines[-1]


def test_a_log_of_an_engine_is_cut_at_its_bound(fresh: Fresh) -> None:
    """By lines of its own: it writes one a request."""
    daemon = fresh(ORCH_LOG__ENGINE_MAX="16KiB").start()
    name = daemon.name("a")
    daemon.add(name)
    log = Path(daemon.model(name)["engine"]["log"])
    older = log.with_name(log.name + ".1")
    with httpx2.Client(base_url=daemon.url, timeout=DEADLINE_S, trust_env=False) as client:

        def cut() -> bool:
            assert client.post("/completions", json={"model": name, "prompt": "x", "max_tokens": 1}).status_code == 200
            return older.exists()

        eventually(cut, "its log was cut")
    assert log.stat().st_size < 16 << 10
    assert older.stat().st_mode & 0o077 == 0
    assert daemon.model(name)["state"] == "ready"
