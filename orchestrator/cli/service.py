"""Verbs for the daemon itself: reload its config files, restart it. What systemctl does too, but said in full."""

import time
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import options, screen
from orchestrator.cli.exits import CONFIG, UNREACHABLE, CliError, Json
from orchestrator.cli.tables import seconds

if TYPE_CHECKING:
    from orchestrator.cli.client import Client

POLL_S = 0.1
BACK_S = 180.0  # requests that run have requests.drain_timeout, engines engines.*.stop_grace


@click.command()
@options.shared
@click.pass_obj
def reload(call: options.Call) -> None:
    """Have the daemon read its config files anew.

    Models follow at once: new ones are known, changed ones are drained and replaced, removed ones drained and ended; what is
    unchanged does not notice. Of the settings those that can change now do, and the others are named. Files with anything
    wrong in them change nothing (exit code 78). The environment of the daemon stays what it was.

    \b
    Examples:
      orchestratorctl reload
      orchestratord check-config && orchestratorctl reload
    """
    answer = _sent(call.client(), "/reload", "nothing was changed")
    models = answer["models"]
    call.show(answer, lambda: "\n".join(_told(answer)), [*models["added"], *models["changed"], *models["removed"]])
    for warning in answer["warnings"] if call.for_people else ():
        screen.err(f"warning: {warning}")


@click.command("restart-daemon")
@click.option("--keep-engines", is_flag=True, help="Its engines go on, and the daemon that comes takes them over.")
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
def restart_daemon(call: options.Call, keep_engines: bool, no_wait: bool, timeout: float | None) -> None:
    """Have the daemon begin again: with what is installed by now, and all its settings.

    It stays the same process, for systemd too. Requests that run are finished first, within its drain time; those that come
    meanwhile wait. With --keep-engines no engine is restarted; else all are ended in order, and started as they are
    asked for. Refused if its config files are wrong (exit code 78).

    \b
    Examples:
      orchestratorctl restart-daemon --keep-engines      # after an upgrade, or a setting that reload named
      orchestratorctl restart-daemon
    """
    client = call.client(timeout)
    asked_at = time.monotonic()
    answer = _sent(client, f"/restart?keep_engines={'true' if keep_engines else 'false'}", "it goes on as it is")
    if not no_wait:
        answer = _back(client, asked_at)
    after = seconds(time.monotonic() - asked_at)
    done = "being restarted" if no_wait else f"back after {after}: version {answer['version']}, {answer['listen']}"
    call.show(answer, lambda: f"the daemon is {done}", [])


def _sent(client: "Client", path: str, so: str) -> Json:
    try:
        return client.send("POST", path)
    except CliError as fault:
        problems: list[Any] = fault.body.get("errors") or []
        if fault.body.get("code") != "invalid_config":
            raise
        lines = [": ".join(part for part in (each.get("field"), each.get("message")) if part) for each in problems]
        count = f"{len(lines)} problem{'s' if len(lines) != 1 else ''}"
        raise CliError(f"the configuration is wrong, {so}: {count}", CONFIG, code="invalid_config", lines=lines, body=fault.body) from None


def _told(answer: Json) -> list[str]:
    models, settings = answer["models"], answer["settings"]
    lines = [f"{name}: added" for name in models["added"]]
    lines += [f"{name}: changed: {', '.join(fields)}" for name, fields in models["changed"].items()]
    lines += [f"{name}: removed" for name in models["removed"]]
    lines += [f"{name}: in force" for name in settings["applied"]]
    if settings["needs_restart"]:
        lines.append(f"only after `orchestratorctl restart-daemon --keep-engines`: {', '.join(settings['needs_restart'])}")
    count = models["unchanged"]
    return [*lines, f"reloaded; {count} model{' is' if count == 1 else 's are'} as before"]


def _back(client: "Client", asked_at: float) -> Json:
    """The status of the daemon that began after `asked_at`."""
    until = asked_at + BACK_S
    while True:
        try:
            status = client.get("/status")
            if float(status["uptime_s"]) < time.monotonic() - asked_at:
                return status
        except CliError as fault:
            if fault.exit_code != UNREACHABLE or time.monotonic() > until:
                raise
        client.patience(None)  # the deadline
        time.sleep(POLL_S)
