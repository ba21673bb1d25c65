"""ModelSpec: what the operator wants of one model. Immutable; every field is checked here and nowhere else.

`launch_key()` says which engine a spec needs: two specs with the same key need no restart to become each other.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from orchestrator.policy.units import Duration, Size, parse_duration, show_bytes

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:@+-]|/(?=[A-Za-z0-9])){0,127}")
# `/models/x/logs` must mean the logs of x, never a model called x/logs: what the operators' API has behind a name (api/admin.py).
ROUTE_WORDS = frozenset(
    ["start", "stop", "load", "unload", "sleep", "wake", "drain", "pin", "unpin", "limit", "adapters", "plan", "watch", "logs"]
)

OWNED_ARGS = {
    # vLLM's flag -> the field to use instead, or "- " and why there is none. A second value would break routing or budgets.
    "--model": "source",
    "--served-model-name": "name and aliases",
    "--host": "- engines listen on a private unix socket, users connect to listen.host",
    "--port": "- engines listen on a private unix socket, users connect to listen.port",
    "--uds": "- the daemon gives each engine its own socket",
    "--tensor-parallel-size": "tensor_parallel_size",
    "-tp": "tensor_parallel_size",
    "--gpu-memory-utilization": "kv_floor and kv_ceiling",
    "--kv-cache-memory-bytes": "kv_ceiling",
    "--api-key": "- engines are reachable by the daemon alone",
    "--root-path": "- the daemon forwards to the engine's root",
    "--api-server-count": "- one API server an engine",
    "--pipeline-parallel-size": "tensor_parallel_size",
    "-pp": "tensor_parallel_size",
    "--config": "- write vLLM's arguments into args, where they are checked",
    "--data-parallel-size": "several models of the same source",
    "-dp": "several models of the same source",
    "--ssl-keyfile": "- put TLS in front of the daemon",
    "--ssl-certfile": "- put TLS in front of the daemon",
    "--enable-sleep-mode": "sleep_level",
    "--lora-modules": "adapters",
    "--worker-extension-cls": "- the daemon's own code answers in the engine",
    "--hf-token": "- every user of the machine can read arguments; write HF_TOKEN into env",
}
OWNED_ENV = (
    "KVCACHED_",
    "ENABLE_KVCACHED",
    "CUDA_VISIBLE_DEVICES",
    "VLLM_PORT",
    "VLLM_API_KEY",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_RPC_BASE_PATH",
)
TUNABLE_ENV = (
    "KVCACHED_MIN_RESERVED_PAGES",
    "KVCACHED_MAX_RESERVED_PAGES",
    "KVCACHED_MAX_CACHED_TOKENS",
    "KVCACHED_CONTIGUOUS_LAYOUT",
    "KVCACHED_LOG_LEVEL",
)


def check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a name: use 1 to 128 letters, digits and . _ : @ + - (and single /), starting with a letter or digit"
        )
    owner, slash, last = name.rpartition("/")
    if slash and last in ROUTE_WORDS:
        raise ValueError(f"{name!r} ends with a word of the admin API: /{last} means something done to {owner!r}; write {owner}-{last}")
    return name


def check_source(source: str) -> str:
    if source.startswith("-"):
        raise ValueError(f"{source!r} would be taken for a flag: write a Hub id, or the path of a folder")
    return check_plain(source)


def check_plain(text: str) -> str:
    """It can be a word of a command line and of a log."""
    if not text.isprintable():
        raise ValueError(f"{text!r} has characters that can not be printed: remove them")
    return text


def owned_flag(arg: str) -> str | None:
    """The owned flag that `arg` spells (`--port=1`, `--served_model_name`), or None."""
    if not arg.startswith("-"):
        return None
    flag = arg.split("=", 1)[0]
    flag = flag.replace("_", "-") if flag.startswith("--") else flag
    if flag in OWNED_ARGS or not flag.startswith("--") or len(flag) < 4:
        return flag if flag in OWNED_ARGS else None
    return next((owned for owned in OWNED_ARGS if owned.startswith(flag)), None)  # argparse takes `--tensor-parallel` for the whole


def check_args(args: tuple[str, ...]) -> tuple[str, ...]:
    """vLLM's arguments, of one model or of all in a venv."""
    for arg in args:
        if "\0" in arg:
            raise ValueError(f"{arg!r} has a zero byte, which no argument can have: remove it")
        if flag := owned_flag(arg):
            instead = OWNED_ARGS[flag]
            mend = instead.removeprefix("- ") if instead.startswith("- ") else f"use a model's field {instead} instead"
            raise ValueError(f"{flag} belongs to the daemon: remove it; {mend}")
    if args and not args[0].startswith("-"):
        raise ValueError(f"{args[0]!r} is not a flag: the model is named by `source`, arguments start with --")
    return args


def check_env(env: dict[str, str]) -> dict[str, str]:
    for key, value in env.items():
        if "\0" in value:
            raise ValueError(f"{key} has a zero byte, which no variable can have: remove it")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ValueError(f"{key!r} is not the name of an environment variable")
        if key.startswith(OWNED_ENV) and key not in TUNABLE_ENV:
            raise ValueError(f"{key} belongs to the daemon: remove it")
    return env


def _zero_or_duration(value: object) -> float:
    nothing = re.fullmatch(r"0+(\.0*)?[dhms]?", value.strip()) if isinstance(value, str) else value == 0 and not isinstance(value, bool)
    return 0.0 if nothing else parse_duration(value)


ZeroOrDuration = Annotated[
    float,
    BeforeValidator(_zero_or_duration),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+(\.\d+)?s?)?$"}]}
    ),
]


class ModelSpec(BaseModel):
    """What the operator wants of one model. Sizes in bytes, durations in seconds, after parsing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="What users write as `model` in a request; unique among names and aliases.")
    source: str = Field(min_length=1, description="Hub id (`Qwen/Qwen2.5-7B-Instruct`) or path of a model folder.")
    aliases: tuple[str, ...] = Field(default=(), description="Other names that requests may use.")
    adapters: dict[str, str] = Field(
        default_factory=dict, description="LoRA adapters, each a model of its own to users: name to Hub id or folder."
    )
    gpus: Literal["auto"] | tuple[Annotated[int, Field(ge=0, strict=True)] | str, ...] = Field(
        default="auto", description="`auto`, or the GPUs it may use, by index or UUID."
    )
    tensor_parallel_size: int = Field(default=1, ge=1, le=64, description="Over how many GPUs the weights are split.")
    args: tuple[str, ...] = Field(default=(), description="More vLLM arguments, each word an item.")
    env: dict[str, str] = Field(default_factory=dict, description="More environment variables of the engine.")
    engine: str = Field(default="default", description="Which of the configured engines (venvs) runs it.")
    kv_floor: Size | None = Field(
        default=None, description="KV memory per GPU it is always promised while it runs. Default: one request of 8,192 tokens."
    )
    kv_ceiling: Size | None = Field(
        default=None, description="KV memory per GPU it may never exceed. Default: the card, less its weights and the reserve."
    )
    kv_weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False, description="Its share of the memory that nobody needs more.")
    priority: int = Field(default=0, ge=-8, le=8, description="Who gets memory first when it is short; each level doubles the weight.")
    pinned: bool = Field(default=False, description="Never stopped or put to sleep for being idle, nor for another model.")
    preload: bool = Field(default=False, description="Started with the daemon, before the first request.")
    sleep_timeout: Duration | None = Field(
        default=300.0, description="Put to sleep after this long without a request: it wakes in under a second; null: never."
    )
    sleep_level: Literal[0, 1, 2] = Field(
        default=1, description="How it sleeps: 1 weights in host memory; 2 weights dropped and read again; 0 never, also not to make room."
    )
    idle_timeout: Duration | None = Field(default=1800.0, description="Stopped after this long without a request; null: never.")
    min_residency: ZeroOrDuration = Field(
        default=30.0, description="Not put to sleep or stopped for another model before it was ready so long; 0: at once."
    )
    start_timeout: Duration = Field(default=600.0, description="A start that takes longer has failed.")
    idle_trim: Duration | None = Field(
        default=10.0, description="After this long without a request it gives back reserved pages and its prefix cache; null: never."
    )
    prefix_cache_tokens: int = Field(
        default=16_000, ge=0, le=10**9, description="Prefix cache that is kept between requests, in tokens; 0: none."
    )
    max_concurrency: int = Field(default=256, ge=1, le=100_000, description="Requests sent to the engine at once; more wait.")
    max_queue: int = Field(default=512, ge=0, le=1_000_000, description="Requests that may wait; more are refused with 429.")

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return check_name(name)

    @field_validator("source")
    @classmethod
    def _source(cls, source: str) -> str:
        return check_source(source)

    @field_validator("aliases")
    @classmethod
    def _aliases(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        for alias in aliases:
            check_name(alias)
        if len(set(aliases)) != len(aliases):
            raise ValueError("an alias is given twice: remove one")
        return aliases

    @field_validator("adapters")
    @classmethod
    def _adapters(cls, adapters: dict[str, str]) -> dict[str, str]:
        for name, source in adapters.items():
            check_name(name)
            if not source.strip():
                raise ValueError(f"{name!r} has no source: name its folder or its Hub id")
            check_source(source)
        return adapters

    @field_validator("gpus")
    @classmethod
    def _gpus(cls, gpus: Literal["auto"] | tuple[int | str, ...]) -> Literal["auto"] | tuple[int | str, ...]:
        if gpus != "auto" and not gpus:
            raise ValueError("the list is empty: write auto, or at least one index or UUID")
        if gpus != "auto" and len({str(gpu) for gpu in gpus}) != len(gpus):
            raise ValueError("a GPU is named twice: remove one")
        return gpus

    _args = field_validator("args")(check_args)
    _env = field_validator("env")(check_env)

    @model_validator(mode="after")
    def _bounds(self) -> "ModelSpec":
        if self.name in self.aliases:
            raise ValueError(f"aliases: {self.name!r} is already the name: remove it from the aliases")
        if twice := sorted(self.adapters.keys() & {self.name, *self.aliases}):
            raise ValueError(f"adapters: {twice[0]!r} is a name of the model itself: an adapter needs one of its own")
        if self.kv_floor is not None and self.kv_ceiling is not None and self.kv_floor > self.kv_ceiling:
            floor, ceiling = show_bytes(self.kv_floor), show_bytes(self.kv_ceiling)
            raise ValueError(f"kv_floor ({floor}) is above kv_ceiling ({ceiling}): lower the floor or raise the ceiling")
        if self.gpus != "auto" and len(self.gpus) < self.tensor_parallel_size:
            wanted = f"tensor_parallel_size is {self.tensor_parallel_size}"
            raise ValueError(f"gpus: {len(self.gpus)} named, but {wanted}: name at least as many GPUs, or auto")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All that users may write to reach its engine."""
        return (self.name, *self.aliases, *self.adapters)

    def launch_key(self) -> str:
        """A digest of all that an engine is started with. A change elsewhere (weight, priority, timeouts) needs no restart."""
        parts = self.model_dump(
            include={"name", "aliases", "source", "gpus", "tensor_parallel_size", "args", "env", "engine", "prefix_cache_tokens"},
            mode="json",
        )
        return _digest({**parts, **self._with_adapters(), "sleeps": self.sleep_level > 0})

    def served_by(self, launched: "ModelSpec") -> bool:
        """Whether an engine that was started for `launched` serves this spec. Asked in each look; mostly they are one object."""
        return self is launched or self.launch_key() == launched.launch_key()

    def footprint_key(self) -> str:
        """A digest of all that decides how much memory and time an engine needs: shared by two models of the same source."""
        parts = self.model_dump(include={"source", "tensor_parallel_size", "args", "env", "engine"}, mode="json")
        return _digest({**parts, **self._with_adapters()})

    def _with_adapters(self) -> dict[str, object]:
        """Nothing where it has none: what was learned before there were any holds."""
        return {"adapters": dict(self.adapters)} if self.adapters else {}

    def flag(self, name: str) -> str | None:
        """The value of vLLM's `--name` in args (`--name v` or `--name=v`), the last one, as argparse has it; "" for a bare flag; None where
        it is absent."""
        return flag_in(self.args, name)


def flag_in(args: Sequence[str], name: str) -> str | None:
    """See ModelSpec.flag."""
    for at, arg in reversed(list(enumerate(args))):
        head, equals, value = arg.partition("=")
        if head.startswith("--") and head.replace("_", "-") == name:
            if equals:
                return value
            following = args[at + 1] if at + 1 < len(args) else ""
            return "" if following.startswith("-") else following
    return None


def slug(name: str) -> str:
    """A name as it may stand in a file name: lower case letters, digits and -, at most 20 characters."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:20].strip("-") or "model"


def _digest(parts: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
