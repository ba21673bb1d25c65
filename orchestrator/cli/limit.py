"""The verb `limit`: change a model's KV bounds while it runs, then show what the loop made of them.

Only what the user named is sent; `default` is sent as null, which gives a bound back to the spec. The daemon checks the
values. The limit is read again after the loop has looked LOOKS times, so that it is never the one from before the change.
"""

import time
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import options, screen
from orchestrator.cli.describe import labelled, limit_text, spec_value
from orchestrator.cli.exits import INTERRUPTED, CliError, Json, hint
from orchestrator.cli.tables import size

if TYPE_CHECKING:
    from orchestrator.cli.client import Client

LOOKS = 2  # the first may have begun before the change; the second also sees what the first has written
LOOK_S = 5.0  # twenty rounds of the daemon's loop: it is stuck, or the driver hangs
POLL_S = 0.1

LABELS = {"kv_floor": "Floor", "kv_ceiling": "Ceiling", "kv_weight": "Weight", "priority": "Priority"}
AUTOMATIC = {
    "kv_floor": ("floor_bytes", "automatic: one request of 8,192 tokens"),
    "kv_ceiling": ("ceiling_bytes", "automatic: what the card leaves"),
}


@click.command()
@options.name_argument
@click.option("--floor", "kv_floor", type=options.or_default(str), metavar="SIZE", help="KV memory per GPU it always has, like 2GiB.")
@click.option("--ceiling", "kv_ceiling", type=options.or_default(str), metavar="SIZE", help="KV memory per GPU it may never exceed.")
@click.option(
    "--weight",
    "kv_weight",
    type=options.or_default(options.weight),
    metavar="W",
    help="Its share of the memory that nobody needs more.",
)
@click.option(
    "--priority",
    type=options.or_default(options.priority),
    metavar="N",
    help="-8 to 8: who gets memory first when it is short.",
)
@click.option("--reset", is_flag=True, help="Give all four back to the spec, but for those named beside it.")
@options.shared
@click.pass_obj
def limit(call: options.Call, /, name: str, reset: bool, **given: Any) -> None:
    """Change a model's KV bounds while it runs.

    Give at least one option. The engine is not restarted, and the bounds are kept over restarts of model and daemon.
    `default` as a value gives that one back to the spec. Prints the new bounds and, once the daemon's loop has looked,
    the limit they led to, and why. A limit below what the engine holds is `draining`: KV leaves as requests finish.

    \b
    Examples:
      orchestratorctl limit qwen --floor 4GiB --ceiling 20GiB
      orchestratorctl limit night --priority -4 --weight 0.5
      orchestratorctl limit qwen --ceiling default        # one bound back to the spec; --reset for all
    """
    order = order_of(given, reset)
    client = call.client()
    from orchestrator.cli.client import model_path

    model = client.send("POST", model_path(name, "/limit"), order)
    if model.get("pool"):
        try:
            model = _after_a_look(client, model_path(str(model["name"])))
        except KeyboardInterrupt:
            advice = f"the bounds are changed, its limit follows; {hint('describe', name)} to look"
            raise CliError(advice, INTERRUPTED, code="interrupted") from None
    call.show(model, lambda: bounds_page(model), [str(model.get("name"))])


def order_of(given: Json, reset: bool) -> Json:
    """The fields to change; null gives one back to the spec."""
    order: Json = dict.fromkeys(LABELS) if reset else {}
    order |= {field: None if value == options.DEFAULT else value for field, value in given.items() if value is not None}
    if not order:
        raise click.UsageError("nothing to change: give --floor, --ceiling, --weight, --priority or --reset")
    return order


def bounds_page(model: Json) -> str:
    """The bounds, where each comes from, and the limit of now."""
    name, pool = str(model.get("name")), model.get("pool") or {}
    rows = [(label, _bound(model, field)) for field, label in LABELS.items()]
    if pool:
        rows += [("Limit", limit_text(pool)), ("Used", size(pool.get("used_bytes")))]
    else:
        rows.append(("Limit", f"none: {name} is {model.get('state')}; the bounds hold as soon as it has a KV pool"))
    return labelled(rows)


def _bound(model: Json, field: str) -> str:
    overrides: Json = model.get("overrides") or {}
    if field in overrides:
        return f"{spec_value(field, overrides[field])} (set at runtime)"
    value = (model.get("spec") or {}).get(field)
    if value is not None:
        return f"{spec_value(field, value)} (of the spec)"
    key, why = AUTOMATIC.get(field, ("", "the daemon's default"))
    now = (model.get("pool") or {}).get(key)
    return why if now is None else f"{size(now)} ({why})"


def _after_a_look(client: "Client", path: str) -> Json:
    """The model once the loop has looked LOOKS times, or as it is after LOOK_S, which is said."""
    give_up = time.monotonic() + LOOK_S
    first = ticks = _ticks(client)
    while ticks - first < LOOKS:
        if time.monotonic() >= give_up:
            screen.err(f"the daemon's loop has not looked for {LOOK_S:g}s: this limit may be the old one; `orchestratorctl status`")
            break
        time.sleep(POLL_S)
        ticks = _ticks(client)
        first = min(first, ticks)  # a daemon that was restarted meanwhile counts anew
    return client.get(path)


def _ticks(client: "Client") -> int:
    return int((client.get("/status").get("loop") or {}).get("ticks") or 0)
