"""The verb `plan`: what loading a model would do, step by step, with nothing done. The daemon decides as it would; this is its page."""

import click

from orchestrator.cli import options
from orchestrator.cli.describe import bare
from orchestrator.cli.exits import BUSY, Json, hint
from orchestrator.cli.tables import seconds, size, table

COLUMNS = ("STEP", "MODEL", "BYTES", "SECONDS", "WHY")


@click.command()
@click.argument("what", type=click.Choice(["load"]), metavar="load")
@options.name_argument
@options.shared
@click.pass_obj
@click.pass_context
def plan(ctx: click.Context, call: options.Call, what: str, name: str) -> None:
    """Show what loading a model would do now, and do nothing.

    BYTES are those of each GPU: `+` is given back by a step, `-` is taken. SECONDS are what the models have shown, or an
    estimate. Steps: `limit` lowers another model's KV limit, `sleep` and `stop` send an idle model away, `wake` or `start`
    brings this one. Exit code 0 if it fits, now or after these steps; 75 if it does not fit now, or if `stop` holds it down:
    then these are the steps of `start`.

    \b
    Examples:
      orchestratorctl plan load qwen
      orchestratorctl plan load qwen && orchestratorctl load qwen
      orchestratorctl plan load qwen --json | jq -r '.steps[] | select(.what == "stop").model'
    """
    client = call.client()
    from orchestrator.cli.client import model_path

    found = client.get(model_path(name, "/plan"))
    call.show(found, lambda: page(found), [str(step.get("model")) for step in found.get("steps") or []])
    if found.get("fits") == "later" or found.get("held"):
        ctx.exit(BUSY)


def page(found: Json) -> str:
    steps: list[Json] = found.get("steps") or []
    lines = [table(COLUMNS, [_row(step) for step in steps]), ""] if steps else []
    if need := found.get("need"):
        parts = " + ".join(f"{part} {size(amount)}" for part, amount in need.items())
        lines.append(f"{found.get('model')} needs {size(found.get('need_bytes'))} on each of its GPUs: {parts}")
    if found.get("held"):
        lines.append(f"an operator stopped it: `load` is refused; {hint('start', str(found.get('model')))} does this")
    return "\n".join([*lines, _verdict(found)])


def _row(step: Json) -> list[str]:
    amount = step.get("bytes") or 0
    given = f"{'+' if amount > 0 else ''}{size(amount)}" if amount else "-"
    return [str(step.get("what")), str(step.get("model")), given, seconds(step.get("seconds")), bare(step.get("why") or "")]


def _verdict(found: Json) -> str:
    why, retry = bare(found.get("why") or "no reason given"), found.get("retry_in_s")
    if found.get("fits") == "ready":
        return f"nothing to do: {why}"
    if found.get("fits") == "later":
        return f"not now: {why}" + (f"; again in {seconds(retry)}" if retry is not None else "")
    return f"{seconds(found.get('seconds'))} until ready"
