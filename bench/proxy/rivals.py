"""Other proxies in front of the mock engine, each as its makers start it for one backend, on one core; and ours, as a whole daemon.

nginx is taken from PATH; the routers and LiteLLM from a venv of their own (`--rivals`), made by
`python3 -m venv V && V/bin/pip install vllm-router sglang-router 'litellm[proxy]'`. What is not there is left out, and said so.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.box import ROOT, Box
from bench.demo import QWEN, SHAPES
from bench.folders import of_shape

MODEL = "mock"
UP_S = 90.0
PROXY_CORE, OTHER_CORE = "0", "1"
QUIET = ("--log-level", "error")  # no line a request: ours writes none either
KEPT = 512  # connections to the engine that nginx keeps


@dataclass(frozen=True)
class Arm:
    """A proxy that runs: where it listens, the process that it begins with (None: there is none), what each request says beside."""

    port: int
    pid: int | None
    headers: Sequence[str] = ()


Start = Callable[["Engines", Path], "contextlib.AbstractContextManager[Arm]"]


class Engines:
    """The mock engine twice, on a TCP port and on a unix socket."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.socket = folder / "engine.sock"

    @contextmanager
    def running(self) -> Iterator[None]:
        with mock("--port", str(self.port)), mock("--uds", str(self.socket)):
            self.socket.chmod(0o777)  # nginx's workers are nobody
            yield


@contextmanager
def mock(*where: str) -> Iterator[None]:
    command = ["taskset", "-c", OTHER_CORE, sys.executable, "-m", "bench.proxy.mock_engine", "--model", MODEL, *where]
    with _process(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"the mock engine did not start: {' '.join(command)}")
        yield


@contextmanager
def direct(engines: Engines, folder: Path) -> Iterator[Arm]:
    yield Arm(engines.port, None)


@contextmanager
def nginx(engines: Engines, folder: Path) -> Iterator[Arm]:
    port, paths = free_port(), {name: folder / f"nginx.{name}" for name in ("pid", "log", "body", "proxy", "fastcgi", "uwsgi", "scgi")}
    temporary = " ".join(f"{name}_temp_path {paths['body' if name == 'client_body' else name]};" for name in ("client_body", *TEMPS))
    config = folder / "nginx.conf"
    config.write_text(
        f"worker_processes 1; daemon off; pid {paths['pid']}; error_log {paths['log']};\n"
        "events { worker_connections 8192; }\n"
        f"http {{ access_log off; {temporary} keepalive_requests 10000000;\n"
        f" upstream engine {{ server unix:{engines.socket}; keepalive {KEPT}; keepalive_requests 10000000; }}\n"
        f" server {{ listen 127.0.0.1:{port} backlog=2048; location / {{ proxy_pass http://engine; proxy_http_version 1.1;\n"
        '  proxy_set_header Connection ""; proxy_buffering off; } } }\n'
    )
    with _process([*PINNED, "nginx", "-c", str(config), "-e", str(paths["log"])]) as process:
        yield Arm(_answering(port, process), process.pid)


TEMPS = ("proxy", "fastcgi", "uwsgi", "scgi")
PINNED = ("taskset", "-c", PROXY_CORE)


def vllm_router(rivals: Path) -> Start:
    def words(engine: str, port: int) -> list[str]:
        return [
            "vllm-router",
            "--worker-urls",
            engine,
            "--port",
            str(port),
            "--policy",
            "round_robin",
            "--prometheus-port",
            str(free_port()),
        ]

    return _tool(rivals, words)


def sglang_router(rivals: Path) -> Start:
    def words(engine: str, port: int) -> list[str]:
        own = ["--port", str(port), "--policy", "round_robin", "--prometheus-port", str(free_port()), *QUIET]
        return ["sglang-router", "launch", "--worker-urls", engine, *own]

    return _tool(rivals, words)


def litellm(rivals: Path) -> Start:
    @contextmanager
    def start(engines: Engines, folder: Path) -> Iterator[Arm]:
        config, port = folder / "litellm.yaml", free_port()
        model = f"{{model: text-completion-openai/{MODEL}, api_base: 'http://127.0.0.1:{engines.port}/v1', api_key: none}}"
        key = f"sk-{secrets.token_hex(32)}"  # it refuses to start without one
        config.write_text(f"model_list:\n  - model_name: {MODEL}\n    litellm_params: {model}\ngeneral_settings: {{master_key: {key}}}\n")
        command = [
            *PINNED,
            str(rivals / "litellm"),
            "--config",
            str(config),
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
            "--num_workers",
            "1",
        ]
        with _process(command, log=folder / "litellm.log") as process:
            yield Arm(_answering(port, process), process.pid, [f"Authorization: Bearer {key}"])

    return start


def controller(python: Path, script: Path) -> Start:
    """kvcached's own controller: `script` is controller/frontend.py of a checkout, run with its venv's python."""

    @contextmanager
    def start(engines: Engines, folder: Path) -> Iterator[Arm]:
        config, port = folder / "controller.yaml", free_port()
        config.write_text(f"instances:\n  - name: one\n    model: {MODEL}\n    engine: vllm\n    engine_args: [--port={engines.port}]\n")
        command = [*PINNED, str(python), str(script), "--config", str(config), "--port", str(port)]
        with _process(command, log=folder / "controller.log") as process:
            yield Arm(_answering(port, process), process.pid)

    return start


@contextmanager
def ours(engines: Engines, folder: Path) -> Iterator[Arm]:
    """A daemon with one simulated engine, whose place at its socket is taken by a mock once it is ready: the loop, its probes of the
    engine and all else go on. Requests have a key, whose requests and tokens a minute are bounded and whose usage is counted."""
    source = of_shape(folder / "qwen-0.5b", QWEN | SHAPES["qwen-0.5b"])
    with Box({"ORCH_GPUS__SOURCE": "simulated", "SIM_LOAD_S": "0"}, sampled=False) as box:
        box.ctl("add-model", MODEL, str(source), "--max-concurrency", "4096")
        box.until_ready([MODEL], UP_S)
        key = box.ctl("keys", "create", "bench", "--model", MODEL, "--rpm", "100000000", "--tpm", "1000000000", "--concurrency", "10000")
        (own,) = (box.folder / "run/engines").glob("*/api.sock")
        own.rename(own.with_suffix(".own"))
        with mock("--uds", str(own)):
            subprocess.run(["taskset", "-apc", PROXY_CORE, str(box.process.pid)], check=True, capture_output=True)
            try:
                port = int(str(box.status()["listen"]).rpartition(":")[2])
                yield Arm(port, box.process.pid, [f"Authorization: Bearer {key.stdout.strip()}"])
            finally:
                own.with_suffix(".own").replace(own)


def _tool(rivals: Path, words: Callable[[str, int], list[str]]) -> Start:
    @contextmanager
    def start(engines: Engines, folder: Path) -> Iterator[Arm]:
        port = free_port()
        name, *rest = words(f"http://127.0.0.1:{engines.port}", port)
        with _process([*PINNED, str(rivals / name), *rest, "--host", "127.0.0.1"], log=folder / f"{name}.log") as process:
            yield Arm(_answering(port, process), process.pid)

    return start


def found(rivals: Path | None, script: Path | None) -> tuple[dict[str, Start], list[str]]:
    """The arms that can run here, and what is left out, with the reason."""
    arms: dict[str, Start] = {"direct": direct}
    missing = []
    if shutil.which("nginx"):
        arms["nginx"] = nginx
    else:
        missing.append("nginx: it is not in PATH")
    for name, tool, start in (
        ("vllm_router", "vllm-router", vllm_router),
        ("sglang_router", "sglang-router", sglang_router),
        ("litellm", "litellm", litellm),
    ):
        if rivals is not None and (rivals / tool).exists():
            arms[name] = start(rivals)
        else:
            missing.append(f"{name}: --rivals names no venv's bin folder that has {tool}")
    if script is not None and rivals is not None:
        arms["kvcached_controller"] = controller(rivals / "python", script)
    else:
        missing.append("kvcached_controller: --controller names no controller/frontend.py of a kvcached checkout")
    arms["ours"] = ours
    return arms, missing


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _answering(port: int, process: "subprocess.Popen[bytes]") -> int:
    deadline = time.monotonic() + UP_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return port
        time.sleep(0.1)
    raise RuntimeError(f"it does not listen: {process.args!r}")


@contextmanager
def _process(command: list[str], stdout: int | None = None, log: Path | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    with contextlib.ExitStack() as held:
        out = stdout if stdout is not None else held.enter_context(open(log, "wb")) if log else subprocess.DEVNULL
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT if stdout is None else None, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="orch-proxy-") as made:
        path = Path(made)
        path.chmod(0o777)
        yield path
