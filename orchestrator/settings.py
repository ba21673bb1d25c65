"""What an operator may set. Strength: environment (ORCH_…, nested with __), then the config files, then the defaults here.

config/orchestrator.yaml holds every field with its default and why (tests/test_docs.py compares them). Only daemon.py reads
Settings; everything else gets plain values. `load()` finds every fault of every source at once: see config_errors.py.
"""

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from orchestrator.policy.model import ModelSpec, check_args, check_env
from orchestrator.policy.units import GIB, MIB, Duration, Size

# Socket paths are at most 107 bytes (sun_path); the longest are vLLM's own (VLLM_RPC_BASE_PATH): <runtime>/engines/<launch id>/<uuid>.
LONGEST_RUNTIME_DIR = 107 - len("/engines/12345678/") - 36
ENDPOINT = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?(?<!/v1/traces)/?")
OTLP = "opentelemetry.exporter.otlp.proto.http"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(Section):
    host: str = Field("127.0.0.1", description="Address of the OpenAI endpoint. Any but loopback is listened on once there is an API key.")
    port: int = Field(8000, ge=0, le=65535, description="Its port; 0 takes a free one and logs it.")


class Admin(Section):
    socket: Path | None = Field(None, description="Unix socket of the admin API. Default: <dirs.runtime>/admin.sock.")
    tcp: bool = Field(False, description="Serve the admin API on listen.host:port too; needs admin.key.")
    key: SecretStr | None = Field(
        None, description="Bearer key that admin requests over TCP must carry. Default: systemd's credential admin.key, if given."
    )
    group: str | None = Field(
        None,
        min_length=1,
        description="Whose members may use the socket, besides root and the daemon's user. Default: orchestrator, if there.",
    )


class Keys(Section):
    required: Literal["auto", "always", "never"] = Field(
        "auto", description="Who is served without an API key: auto: all, until a first key was made; always: nobody; never: all."
    )


class Metrics(Section):
    local: bool = Field(
        False, description="Serve GET /metrics on listen.host:port too, without a key, to callers on this machine. Else: the admin API's."
    )


class Traces(Section):
    endpoint: str | None = Field(
        None, description="OpenTelemetry collector (OTLP over HTTP) that spans go to: http://HOST:4318. Needs the extra `otel`. null: none."
    )
    sample: float = Field(1.0, ge=0, le=1, description="Share of the requests without a traceparent of their client's that are traced.")

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, given: str | None) -> str | None:
        if given is None:
            return None
        if not ENDPOINT.fullmatch(given):
            raise ValueError("must be http://HOST:PORT or https://HOST:PORT, without /v1/traces, which is added")
        if not _is_installed(OTLP):
            raise ValueError("needs OpenTelemetry: pip install 'gpu-orchestrator[otel]' into the daemon's venv, or leave it null")
        return given


class Dirs(Section):
    state: Path | None = Field(
        None, description="The SQLite file. Default: $STATE_DIRECTORY, else /var/lib/orchestrator (root) or ~/.local/state/orchestrator."
    )
    runtime: Path | None = Field(
        None,
        description="Sockets. Default: $RUNTIME_DIRECTORY, else /run/orchestrator (root), $XDG_RUNTIME_DIR/orchestrator"
        " or /tmp/orchestrator-<uid>.",
    )
    logs: Path | None = Field(None, description="Engine logs. Default: $LOGS_DIRECTORY, else <dirs.state>/logs.")


class SimulatedGpus(Section):
    count: int = Field(1, ge=1, le=64, description="How many cards.")
    memory: Size = Field(80 * GIB, description="Memory of each.")


class Gpus(Section):
    source: Literal["nvml", "simulated", "auto"] = Field("nvml", description="auto: simulated cards where NVML shows none.")
    simulated: SimulatedGpus = SimulatedGpus()


class Memory(Section):
    reserve: Size | None = Field(None, description="Kept free on each GPU. Default: 3 % of the card, at least 2 % + 512MiB.")
    limit_writer: Literal["direct", "kvctl"] = Field(
        "direct", description="kvctl: limits are written by the engine venv's own kvctl, 3 s a call, instead of directly."
    )
    sleepers: Size | None = Field(None, description="Host memory that sleeping models may hold in all. Default: half of the machine's.")


class Loop(Section):
    interval: Duration = Field(0.25, ge=0.02, description="How often the world is looked at, besides when something happens.")


class Requests(Section):
    max_body: Size = Field(128 * MIB, ge=1024, description="A larger request body is refused with 413.")
    max_bodies: Size = Field(
        2 * GIB,
        ge=1024,
        description="What bodies over 64KiB may hold together until their requests are answered; one too many is refused with 503.",
    )
    max_wait: Duration = Field(600.0, description="How long a request may wait for its model (503 and Retry-After after that).")
    max_queue: int = Field(4096, ge=1, description="How many may wait, for all models together (429 above that).")
    drain_timeout: Duration = Field(60.0, description="How long a model that is being stopped may finish its requests.")


class Engine(Section):
    """One venv that holds vLLM and kvcached."""

    kind: Literal["vllm", "simulated"] = Field("vllm", description="simulated: a process that speaks like vLLM and needs no GPU.")
    python: Path = Field(Path("/opt/orchestrator/engine/bin/python"), description="Python of the engine's venv (see `make engine`).")
    env: dict[str, str] = Field({}, description="Environment of every engine of this venv.")
    args: tuple[str, ...] = Field((), description="vLLM arguments of every engine of this venv.")
    stop_grace: Duration = Field(10.0, description="From SIGTERM to SIGKILL.")
    hang_timeout: Duration | None = Field(
        20.0,
        ge=1.0,
        description="An engine that does not get on for so long is asked for a token; without one in 10 s it is replaced. null: never.",
    )
    launch_server: bool = Field(True, description="Fork its engines from a process that has imported vLLM: 4 s to ready instead of 41.")

    _args = field_validator("args")(check_args)
    _env = field_validator("env")(check_env)


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is worth a line.")
    format: Literal["auto", "text", "json", "journald"] = Field(
        "auto", description="auto: for people on a terminal, fields for systemd's journal where stderr goes there, json elsewhere."
    )
    access: bool = Field(False, description="A line for each request: who, model, status, tokens, times.")
    engine_max: Size = Field(
        64 * MIB, ge=4096, description="A log of an engine that is larger goes on in an empty file; the part before is kept, one."
    )


def _named(models: object) -> object:
    """`models` is a map by name: hand each spec its name."""
    if not isinstance(models, Mapping):
        return models
    named: dict[object, object] = {}
    for name, body in models.items():
        if isinstance(body, Mapping) and "name" not in body:
            named[name] = {**body, "name": name}
        elif isinstance(body, Mapping) and body["name"] != name:
            raise ValueError(f"{name!r} is named {body['name']!r} inside: remove `name`, the key is the name")
        else:
            named[name] = body
    return named


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="ORCH_", env_nested_delimiter="__", extra="forbid", frozen=True)

    listen: Listen = Listen()
    admin: Admin = Admin()
    keys: Keys = Keys()
    metrics: Metrics = Metrics()
    traces: Traces = Traces()
    dirs: Dirs = Dirs()
    gpus: Gpus = Gpus()
    memory: Memory = Memory()
    loop: Loop = Loop()
    requests: Requests = Requests()
    engines: dict[str, Engine] = Field({"default": Engine()}, min_length=1, description="Engine venvs by name; a model names one.")
    log: Log = Log()
    models: Annotated[
        dict[str, ModelSpec], Field(description="Models by name. Those added by `orchestratorctl add-model` are kept elsewhere.")
    ] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (env_settings, init_settings)  # init_settings carries the config files

    @field_validator("models", mode="before")
    @classmethod
    def _named_models(cls, models: object) -> object:
        return _named(models)

    @model_validator(mode="after")
    def _cross(self) -> "Settings":
        problems = []
        if self.admin.tcp and self.admin_key is None:
            problems.append("admin.tcp: is on without a key: set admin.key (or ORCH_ADMIN__KEY), or turn it off")
        taken: dict[str, str] = {}
        for spec in self.models.values():
            for name in spec.names:
                if name in taken:
                    problems.append(
                        f"models.{spec.name}: the name {name!r} is already that of {taken[name]!r}: names and aliases must be unique"
                    )
                taken.setdefault(name, spec.name)
            if spec.engine not in self.engines:
                problems.append(f"models.{spec.name}.engine: there is no engine {spec.engine!r}; known: {', '.join(sorted(self.engines))}")
        if len(os.fsencode(self.runtime_dir)) > LONGEST_RUNTIME_DIR:
            problems.append(
                f"dirs.runtime: {self.runtime_dir} is longer than {LONGEST_RUNTIME_DIR} bytes, too long for unix sockets: use a shorter one"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def state_dir(self) -> Path:
        root = Path("/var/lib/orchestrator") if os.getuid() == 0 else Path.home() / ".local/state/orchestrator"
        return self.dirs.state or _systemd("STATE_DIRECTORY") or root

    @property
    def runtime_dir(self) -> Path:
        if self.dirs.runtime or (given := _systemd("RUNTIME_DIRECTORY")):
            return self.dirs.runtime or given  # type: ignore[return-value]
        if os.getuid() == 0:
            return Path("/run/orchestrator")
        xdg = os.environ.get("XDG_RUNTIME_DIR")
        return Path(xdg) / "orchestrator" if xdg else Path(f"/tmp/orchestrator-{os.getuid()}")

    @property
    def logs_dir(self) -> Path:
        return self.dirs.logs or _systemd("LOGS_DIRECTORY") or self.state_dir / "logs"

    @property
    def admin_key(self) -> SecretStr | None:
        """Where neither a file nor the environment has one, it is what systemd hands over (LoadCredential=admin.key:PATH)."""
        return self.admin.key or _credential("admin.key")

    @property
    def admin_socket(self) -> Path:
        return self.admin.socket or self.runtime_dir / "admin.sock"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is not
        return False


def _systemd(variable: str) -> Path | None:
    """systemd's own answer for its *Directory= settings; the first of several, separated by colons."""
    given = os.environ.get(variable, "").split(":")[0]
    return Path(given) if given else None


def _credential(name: str) -> SecretStr | None:
    """None where there is none, or a blank one: the unit names it for whoever has it. Raises ValueError where it cannot be read."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    try:
        given = (Path(folder) / name).read_text().strip() if folder else ""
    except FileNotFoundError:
        given = ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"admin.key: the credential cannot be read: {error}") from None
    return SecretStr(given) if given else None


def schema() -> dict[str, Any]:
    """The JSON Schema of a config file. A model needs no `name` there: its key is the name."""
    made = Settings.model_json_schema()
    made["title"] = "orchestrator configuration"
    spec = made["$defs"]["ModelSpec"]
    spec["required"] = [field for field in spec.get("required", []) if field != "name"]
    return made
