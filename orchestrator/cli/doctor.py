"""doctor: what of the daemon's machine is not as it should be, each with the mend."""

import click

from orchestrator.cli import options, screen
from orchestrator.cli.describe import bare
from orchestrator.cli.exits import FAILED

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
    if call.json:
        screen.out_json(answer)
    else:
        for found in answer["findings"]:
            state = click.style(str(found["state"]).ljust(WIDTH), fg=COLOURS.get(found["state"]))
            screen.out(f"{state}  {bare(found['about'])}: {bare(found['what'])}")
            if found["mend"]:
                screen.out(f"{'':{WIDTH}}  -> {bare(found['mend'])}")
    if any(found["state"] == "bad" for found in answer["findings"]):
        ctx.exit(FAILED)
