"""doctor: what of the daemon's machine is not as it should be, each with the mend."""

from collections.abc import Sequence

import click

from orchestrator.cli import options
from orchestrator.cli.describe import bare
from orchestrator.cli.exits import FAILED, Json

COLOURS = {"ok": "green", "warning": "yellow", "bad": "red"}
WIDTH = max(map(len, COLOURS))


@click.command()
@options.shared
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """What of the daemon's machine is not as it needs it, each with the mend.

    It looks at its GPUs and at NVML, its engine venvs (are vLLM and kvcached there, and do they fit each other), the models of its
    config files, /dev/shm, its folders and their disks, its limits. Exit code 1 if anything is bad. Where there is no daemon,
    `orchestratord doctor` looks by itself.

    \b
    Examples:
      orchestratorctl doctor
      orchestratorctl doctor --json
    """
    call: options.Call = ctx.obj
    answer = call.client().get("/doctor")
    call.show(answer, lambda: page(answer["findings"]), [bare(found["about"]) for found in answer["findings"]])
    if any(found["state"] == "bad" for found in answer["findings"]):
        ctx.exit(FAILED)


def page(findings: Sequence[Json]) -> str:
    lines = []
    for found in findings:
        state = click.style(str(found["state"]).ljust(WIDTH), fg=COLOURS.get(found["state"]))
        lines.append(f"{state}  {bare(found['about'])}: {bare(found['what'])}")
        if found["mend"]:
            lines.append(f"{'':{WIDTH}}  -> {bare(found['mend'])}")
    return "\n".join(lines)
