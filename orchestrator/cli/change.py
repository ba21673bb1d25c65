"""Verbs that change something: add-model, rm, start, stop. Each sends one order, then waits for it unless told not to.

The spec goes to the daemon as the user wrote it, and only what the user wrote: defaults and checks live there, once.
"""

import os.path
import time
from typing import Any

import click

from orchestrator.cli import options, wait
from orchestrator.cli.exits import Json, hint


class AddModel(click.Command):
    """A command whose words after `--` belong to vLLM; click alone would mix them with the arguments before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ours, theirs = args, list[str]()
        if "--" in args:
            at = args.index("--")
            ours, theirs = args[:at], args[at + 1 :]
        ctx.meta["engine_args"] = theirs
        try:
            return super().parse_args(ctx, ours)
        except click.NoSuchOption as fault:
            raise click.UsageError(f"{fault.format_message()} Options of vLLM go after `--`.", ctx) from None

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- VLLM ARGS...]"]


@click.command("add-model", cls=AddModel)
@click.argument("name")
@click.argument("source")
@click.option("--alias", "aliases", multiple=True, metavar="A", help="Another name that requests may use. Repeatable.")
@click.option("--adapter", "adapters", multiple=True, type=options.adapter, metavar="NAME=SOURCE",
              help="A LoRA adapter of it, asked for by that name. Repeatable; ranks above 16: `-- --max-lora-rank N`.")  # fmt: skip
@click.option("--gpu", "gpus_wanted", multiple=True, type=options.gpu, metavar="G",
              shell_complete=options.gpu_indexes,
              help="A GPU it may use, by index or UUID. Repeatable. [default: auto]")  # fmt: skip
@click.option(
    "--tp",
    "tensor_parallel_size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Split the weights over N GPUs. [default: 1]",
)
@click.option("--engine", metavar="E", help="Which of the configured engines (venvs) runs it. [default: default]")
@click.option(
    "--env",
    "variables",
    multiple=True,
    type=options.variable,
    metavar="K=V",
    help="A variable of the engine's environment. Repeatable.",
)
@click.option(
    "--kv-floor",
    metavar="SIZE",
    help="KV memory per GPU it always has while it runs, like 2GiB. [default: one request of 8,192 tokens]",
)
@click.option("--kv-ceiling", metavar="SIZE", help="KV memory per GPU it may never exceed. [default: what the card leaves]")
@click.option(
    "--kv-weight",
    type=options.weight,
    metavar="W",
    help="Its share of the memory that nobody needs more. [default: 1]",
)
@click.option("--priority", type=int, metavar="N", help="-8 to 8: who gets memory first when it is short. [default: 0]")
@click.option("--pinned", is_flag=True, help="Never stop it or put it to sleep for being idle, nor for another model.")
@click.option("--preload", is_flag=True, help="Start it with the daemon, before the first request.")
@click.option(
    "--sleep-timeout",
    metavar="D",
    help="Put it to sleep after this long without a request, like 2m: it wakes in under a second; `never`. [default: 5m]",
)
@click.option(
    "--sleep-level",
    type=click.IntRange(0, 2),
    metavar="L",
    help="1: asleep, its weights are in host memory; 2: dropped and read again; 0: it never sleeps. [default: 1]",
)
@click.option("--idle-timeout", metavar="D", help="Stop it after this long without a request, like 10m; `never`. [default: 30m]")
@click.option("--min-residency", metavar="D", help="It does not go for another model before it was ready so long. [default: 30s]")
@click.option("--start-timeout", metavar="D", help="A start that takes longer has failed. [default: 10m]")
@click.option(
    "--max-concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests in the engine at once; more wait. [default: 256]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    metavar="N",
    help="Requests that may wait; more get HTTP 429. [default: 512]",
)
@click.option("--no-start", is_flag=True, help="Only register it: its first request starts it.")
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
@click.pass_context
def add_model(ctx: click.Context, call: options.Call, /, no_start: bool, no_wait: bool, timeout: float | None, **given: Any) -> None:
    """Register a model, start it, and wait until it is ready.

    NAME is what users write as `model` in a request; SOURCE is a Hub id or a model's folder as the daemon sees it
    (`./x` and `~/x` are made absolute here). Words after `--` go to vLLM as they stand. Memory needs no numbers: the
    daemon measures the model and moves KV memory between models as they need it. Ctrl-C stops the waiting, not the
    start. A model that fails to start stays registered. The defaults below hold unless the daemon's configuration
    sets others.

    \b
    Examples:
      orchestratorctl add-model qwen Qwen/Qwen2.5-7B-Instruct
      orchestratorctl add-model big ~/models/llama-70b --tp 2 --gpu 0 --gpu 1 --pinned -- --max-model-len 32768
      orchestratorctl add-model night org/batch-model --priority -2 --idle-timeout 5m --no-start
    """
    spec = spec_of(given, ctx.meta["engine_args"])
    name = spec["name"]
    asked_at = time.monotonic()
    with wait.detachable([name], "ready", hint("rm", name)):
        client = call.client(timeout)
        model = client.send("POST", f"/models?start={'false' if no_start else 'true'}", spec)
        if not (no_start or no_wait):
            model = wait.follow(client, name, "ready", asked_at)
    if no_start:
        _done(call, model, f"{name} is registered; its first request starts it, or {hint('start', name)}")
    elif no_wait:
        _done(call, model, f"{name} is registered and starts; {hint('describe', name)} to look")
    else:
        _done(call, model, wait.arrival(name, model, asked_at))


def spec_of(given: dict[str, Any], engine_args: list[str]) -> Json:
    """The spec's fields that the user gave, as given."""
    # By identity: 0 is a value that a user may give (`--max-queue 0`), and 0 == False.
    spec: Json = {key: value for key, value in given.items() if value is not None and value is not False and value != ()}
    wanted: tuple[int | str, ...] = spec.pop("gpus_wanted", ())
    if wanted:
        if "auto" in wanted and len(wanted) > 1:
            raise click.BadParameter("auto stands alone: give `--gpu auto`, or name the GPUs", param_hint="'--gpu'")
        spec["gpus"] = "auto" if "auto" in wanted else list(wanted)
    if variables := spec.pop("variables", ()):
        spec["env"] = dict(variables)
    if adapters := spec.pop("adapters", ()):
        spec["adapters"] = {name: as_the_daemon_sees_it(source) for name, source in adapters}
    if "aliases" in spec:
        spec["aliases"] = list(spec["aliases"])
    if engine_args:
        spec["args"] = engine_args
    spec |= dict.fromkeys((each for each in ("sleep_timeout", "idle_timeout") if spec.get(each) == "never"), None)
    spec["source"] = as_the_daemon_sees_it(spec["source"])
    return spec


def as_the_daemon_sees_it(source: str) -> str:
    """It has another working directory and home. `org/name` stays a Hub id even where such a folder exists."""
    local = source.startswith(("./", "../", "~")) or source in (".", "..")
    return os.path.abspath(os.path.expanduser(source)) if local else source


@click.command()
@options.name_argument
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
def rm(call: options.Call, name: str, no_wait: bool, timeout: float | None) -> None:
    """Stop a model, forget it, and wait until it is gone.

    Requests that run are finished first, within the daemon's drain time. A model that the configuration file defines
    cannot be removed here: edit the file and reload.

    \b
    Examples:
      orchestratorctl rm qwen
      orchestratorctl rm qwen --timeout 30s
    """
    model = _order(call, "DELETE", name, "", "removed", no_wait, timeout, undo=None)
    _done(call, model, f"{name} is being removed" if no_wait else f"{name} is removed")


@click.command()
@options.name_argument
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
def start(call: options.Call, name: str, no_wait: bool, timeout: float | None) -> None:
    """Start a model, or wake it, and wait until it is ready.

    As `load`, and lifts the hold that `stop` put on it. Tries a failed model again at once.

    \b
    Examples:
      orchestratorctl start qwen
      orchestratorctl start qwen --no-wait
    """
    asked_at = time.monotonic()
    model = _order(call, "POST", name, "/start", "ready", no_wait, timeout, undo=hint("stop", name))
    _done(call, model, f"{name} starts; {hint('describe', name)} to look" if no_wait else wait.arrival(name, model, asked_at))


@click.command()
@options.name_argument
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
def stop(call: options.Call, name: str, no_wait: bool, timeout: float | None) -> None:
    """Stop a model, keep it registered.

    Waits until its engine is gone; requests that run have the daemon's drain time. The model is held: requests do not
    start it again until `start` does. To free memory only until the next request: `sleep`, `unload` or `drain`.

    \b
    Examples:
      orchestratorctl stop qwen
      orchestratorctl stop qwen && orchestratorctl ps
    """
    model = _order(call, "POST", name, "/stop", "stopped", no_wait, timeout, undo=hint("start", name))
    _done(call, model, f"{name} is {'being stopped' if no_wait else 'stopped'}; {hint('start', name)} starts it again")


def _order(
    call: options.Call,
    method: str,
    name: str,
    verb: str,
    goal: wait.Goal,
    no_wait: bool,
    timeout: float | None,
    undo: str | None,
) -> Json:
    asked_at = time.monotonic()
    with wait.detachable([name], goal, undo):
        client = call.client(timeout)
        from orchestrator.cli.client import model_path

        model = client.send(method, model_path(name, verb))
        return model if no_wait else wait.follow(client, name, goal, asked_at)


def _done(call: options.Call, model: Json, sentence: str) -> None:
    call.show(model, lambda: sentence, [str(model.get("name"))])
