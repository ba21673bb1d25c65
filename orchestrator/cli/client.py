"""The admin API: one call, one connection; a unix socket or TCP.

Every failure leaves as a CliError with its exit code, or as DeadlinePassed. What a daemon of another version does not know, or does
not tell, is said with both versions. Imported when a verb first calls the daemon (sockets and JSON cost 20 ms), never at the top of
another module.
"""

import json
import time
from collections.abc import Iterator
from typing import Any, Self
from urllib.parse import quote

from orchestrator import __version__
from orchestrator.cli import wire
from orchestrator.cli.exits import (
    BUSY,
    CONFIG,
    DENIED,
    FAILED,
    NOT_FOUND,
    NOT_RUNNING,
    UNREACHABLE,
    CliError,
    DeadlinePassed,
    Json,
)
from orchestrator.cli.target import Target, no_permission

BASE = "/api/v1"
CONNECT_S = 5.0
START = "start it (`make run`, `systemctl start orchestrator`), or name another with --host"
ANSWER_S = 30.0  # an admin call only records a wish; a daemon that needs longer is stuck

BY_STATUS = {400: CONFIG, 401: DENIED, 403: DENIED, 404: NOT_FOUND, 409: FAILED, 422: CONFIG, 429: BUSY, 503: BUSY}
BY_CODE = {"not_running": NOT_RUNNING, "no_log": NOT_RUNNING, "busy": BUSY}  # what says more than the status
UNKNOWN_CALL = ("not_the_admin_api", "method_not_allowed")  # to a daemon of another version


def model_path(name: str, verb: str = "") -> str:
    return f"/models/{quote(name, safe='')}{verb}"


class Client:
    """Calls the daemon at `target`. `deadline` is a time.monotonic() after which every call raises DeadlinePassed."""

    def __init__(self, target: Target, admin_key: str | None = None, deadline: float | None = None, answer_s: float = ANSWER_S) -> None:
        self.target = target
        self.deadline = deadline
        self._admin_key = admin_key
        self._answer_s = answer_s
        self._headers = {"Accept": "application/json"}
        if admin_key:
            self._headers["Authorization"] = f"Bearer {admin_key}"

    def get(self, path: str) -> Json:
        return self.send("GET", path)

    def models(self) -> Json:
        """The list object; whatever else answers is not the admin API."""
        found = self.get("/models")
        if not isinstance(found.get("models"), list):
            raise _stranger("knows no models", self.target)
        return found

    def explained(self) -> Json:
        """Under `gpus`: each GPU with its lines and pools."""
        found = self.get("/explain")
        if not isinstance(found.get("gpus"), list):
            raise _stranger("explains no GPUs", self.target)
        return found

    def text(self, path: str) -> str:
        """Of a route beside the admin API."""
        with self.open("GET", path, base="") as answer:
            return answer.body().decode(errors="replace")

    def send(self, method: str, path: str, body: Json | None = None) -> Json:
        with self.open(method, path, body) as answer:
            return answer.json()

    def open(self, method: str, path: str, body: Json | None = None, base: str = BASE) -> "Answer":
        """Sends, and returns once the status line is there and good."""
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers if data is None else {**self._headers, "Content-Type": "application/json"}
        answer = Answer(self)
        try:
            answer.connect(min(CONNECT_S, self._answer_s))
            answer.wait_at_most(self._answer_s)
            answer.ask(method, f"{self.target.prefix}{base}{path}", headers, data)
            if answer.response.status >= 300:
                refusal = _refusal(answer.response.status, answer.body(), answer.response.headers.get("retry-after"), self.target)
                unknown = refusal.body["code"] in UNKNOWN_CALL and path != "/status"
                raise (self.other_version("does not know this call") if unknown else None) or refusal
        except (OSError, wire.NotHttp) as fault:
            answer.close()
            raise self.lost(fault) from fault
        except BaseException:
            answer.close()
            raise
        return answer

    def other_version(self, what: str) -> CliError | None:
        """Why the daemon `what`: it is not of our version. None where it is, or does not say."""
        try:
            theirs = str(Client(self.target, self._admin_key, self.deadline, CONNECT_S).get("/status").get("version") or "")
        except (CliError, DeadlinePassed):
            return None
        if theirs in ("", __version__):
            return None
        message = f"the daemon {what}: it is version {theirs}, this orchestratorctl is {__version__}"
        line = "run the orchestratorctl that came with it; after an upgrade: `orchestratorctl restart-daemon --keep-engines`"
        return CliError(message, FAILED, code="other_version", lines=[line], body={"daemon": theirs, "orchestratorctl": __version__})

    def patience(self, most_s: float | None) -> float | None:
        """How long a socket may keep us waiting: `most_s`, or what is left until the deadline; None for ever."""
        if self.deadline is None:
            return most_s
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlinePassed
        return left if most_s is None else min(left, most_s)

    def lost(self, fault: Exception) -> Exception:
        """What a broken or silent connection means to the caller."""
        if isinstance(fault, TimeoutError) and self.deadline is not None and time.monotonic() >= self.deadline:
            return DeadlinePassed()
        shown = self.target.shown
        if isinstance(fault, PermissionError):
            message = no_permission(self.target.socket) if self.target.socket else f"no permission to connect to {shown}"
            return CliError(message, DENIED, code="permission_denied")
        if isinstance(fault, FileNotFoundError):
            why = f"there is no such socket: {START}"
        elif isinstance(fault, ConnectionRefusedError):
            why = f"nobody listens there, the daemon has stopped or died: {START}"
        elif isinstance(fault, TimeoutError):
            why = "no answer in time: is the daemon stuck? `systemctl status orchestrator`, or its log"
        elif isinstance(fault, ConnectionError):
            why = "the daemon closed the connection: is it restarting? `orchestratorctl status`"
        elif isinstance(fault, wire.NotHttp):
            why = "what answers there does not speak HTTP: is --host right?"
        else:
            why = f"{fault}: is --host right?"
        return CliError(f"no daemon at {shown}: {why}", UNREACHABLE, code="daemon_unreachable")


class Answer:
    """One answer, to be read whole or line by line. A context manager: leaving it closes the connection."""

    response: wire.Response

    def __init__(self, client: Client) -> None:
        self._client = client
        self._connection: wire.Connection | None = None

    def connect(self, most_s: float) -> None:
        target, timeout = self._client.target, self._client.patience(most_s)
        assert timeout is not None
        self._connection = wire.Connection(target.socket or (target.host, target.port), timeout)

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> None:
        assert self._connection is not None
        self.response = self._connection.ask(method, path, headers, body)

    def wait_at_most(self, seconds: float | None) -> None:
        assert self._connection is not None
        self._connection.socket.settimeout(self._client.patience(seconds))

    def body(self) -> bytes:
        try:
            return self.response.read()
        except (OSError, wire.NotHttp) as fault:
            raise self._client.lost(fault) from fault

    def json(self) -> Json:
        return _object(self.body(), self._client.target)

    def line(self, wait_s: float | None = None) -> bytes:
        """The next line with its end, b"" after the last. TimeoutError after `wait_s`: nothing can be read any more."""
        try:
            self.wait_at_most(wait_s)
            return self.response.line()
        except (OSError, wire.NotHttp) as fault:
            lost = self._client.lost(fault)
            if wait_s is not None and isinstance(fault, TimeoutError) and not isinstance(lost, DeadlinePassed):
                raise
            raise lost from fault

    def lines(self) -> Iterator[bytes]:
        while line := self.line():
            yield line

    def object_line(self, wait_s: float | None = None) -> Json | None:
        """The next NDJSON object; None after the last. A blank line keeps a connection alive and says nothing."""
        while (line := self.line(wait_s)) and not line.strip():
            continue
        return _object(line, self._client.target) if line else None

    def close(self) -> None:
        response = getattr(self, "response", None)
        if response is not None:
            response.close()
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _object(data: bytes, target: Target) -> Json:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _stranger(f"answered {data[:60]!r}", target)
    return value


def _stranger(what: str, target: Target) -> CliError:
    message = f"{target.shown} {what}: that is not the orchestrator's admin API; is --host right?"
    return CliError(message, UNREACHABLE, code="not_the_admin_api")


def _refusal(status: int, data: bytes, retry_after: str | None, target: Target) -> CliError:
    """The daemon's error object as an exit code; what is no error object comes from something else."""
    try:
        error: Any = json.loads(data)["error"]
        message = str(error["message"])
        code = error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        if status < 500 and status not in (401, 403):
            return _stranger(f"answered HTTP {status}", target)
        return CliError(f"{target.shown} answered HTTP {status}", BY_STATUS.get(status, FAILED), code=f"http_{status}")
    if code == "route_not_found":
        return _stranger("knows no such call", target)
    exit_code = BY_CODE.get(str(code), BY_STATUS.get(status, FAILED))
    problems = [each for each in error.get("errors") or [] if isinstance(each, dict)]
    lines = [f"  {each.get('field') or 'spec'}: {each.get('message')}" for each in problems]
    if len(problems) > 0:
        message = f"the daemon refused the spec: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    if retry_after:
        lines.append(f"  try again in {retry_after}s")
    if status == 401 or (status == 403 and target.socket is None):  # on the socket a key does not help
        lines.append("  give the admin key with ORCH_ADMIN_KEY or --admin-key")
    return CliError(message, exit_code, code=str(code), lines=lines, body=error)
