"""orchestratord, the command: serve, check-config, doctor, end-engines, schema. Errors become lines and exit codes here alone."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import uvloop

from orchestrator import __version__, config_errors, daemon, doctor, logs, settings
from orchestrator.drivers.nvml import Nvml
from orchestrator.drivers.sources import Sources
from orchestrator.errors import ConfigError, OrchestratorError, Problem
from orchestrator.policy.snapshot import GpuReading
from orchestrator.settings import Settings

DEFAULT_CONFIG = Path("/etc/orchestrator/orchestrator.yaml")
KILLED = ("signal", "core-dump", "watchdog", "oom-kill")  # systemd.exec(5), $SERVICE_RESULT: the daemon died, and will be started again

CONFIG = click.option(
    "--config", "-c", "files", multiple=True, type=click.Path(path_type=Path), envvar="ORCH_CONFIG",
    help=f"Config file; may be given more than once, later ones add and override. Default: {DEFAULT_CONFIG} if it exists.",
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="orchestratord")
def main() -> None:
    """The daemon that shares GPUs between many language models.

    Settings come from the environment (ORCH_LISTEN__PORT=9000), then --config files, then defaults. Exit codes: 0 stopped in
    order, 1 this machine does not allow it (folder locked, port in use), 78 the configuration is wrong.
    """


@main.command("serve")
@CONFIG
def serve(files: tuple[Path, ...]) -> None:
    """Run in the foreground until SIGTERM, Ctrl-C or the end of the terminal, which end the engines too. SIGHUP reloads the config files.

    Example: orchestratord serve --config config/orchestrator.yaml --config config/models.yaml
    """
    with _exit_codes():
        files = _files(files)
        config = config_errors.load(files, os.environ)
        logs.set_up(config.log.level, config.log.format, config.log.access)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            ending = runner.run(daemon.serve(config, files))
        if ending.restart:
            ending.become_next()


@main.command("check-config")
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON on stdout.")
def check_config(files: tuple[Path, ...], as_json: bool) -> None:
    """Read the configuration and say everything that is wrong with it: file, line, nearest right name. Exit code 78 if anything is."""
    files = _files(files)
    try:
        config = _checked(files)
    except ConfigError as error:
        if as_json:
            click.echo(json.dumps({"problems": [{"where": p.where, "what": p.what} for p in error.problems]}, indent=2))
        else:
            for problem in error.problems:
                click.echo(str(problem), err=True)
            click.echo(f"{len(error.problems)} problem{'s' if len(error.problems) != 1 else ''}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps({"problems": []}))
    else:
        click.echo(f"{', '.join(map(str, files)) or 'defaults and environment'}: correct, {len(config.models)} models")


@main.command("doctor")
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
def examine(files: tuple[Path, ...], as_json: bool) -> None:
    """What of this machine is not as the daemon needs it, each with the mend: GPUs, engine venvs, models, folders, limits.

    As the user that the daemon runs as. Where it runs, `orchestratorctl doctor` asks it. Exit code 1 if anything is bad.

    Example: sudo -u orchestrator orchestratord doctor
    """
    with _exit_codes():
        config = config_errors.load(_files(files), os.environ)
        findings = doctor.examine(config, _readings, config.gpus.source == "simulated")
    if as_json:
        click.echo(json.dumps({"findings": [found.shown() for found in findings]}, indent=2))
    else:
        for found in findings:
            click.echo(f"{found.state:8} {found.about}: {found.what}" + (f"\n{'':8} -> {found.mend}" if found.mend else ""))
    sys.exit(any(found.state == "bad" for found in findings))


def _readings() -> Sequence[GpuReading]:
    nvml = Nvml()
    try:
        return nvml.read()
    finally:
        nvml.close()


@main.command("end-engines")
@CONFIG
@click.option(
    "--unless-killed", is_flag=True,
    help="Not where systemd says ($SERVICE_RESULT) that the daemon was killed: the next one takes them over.",
)  # fmt: skip
def end_engines(files: tuple[Path, ...], unless_killed: bool) -> None:
    """End the engines that a daemon left running which is gone, and remove what they leave. Refused while a daemon runs.

    Example: sudo -u orchestrator orchestratord end-engines
    """
    if unless_killed and os.environ.get("SERVICE_RESULT") in KILLED:
        click.echo("the daemon was killed: its engines go on, and the next one takes them over", err=True)
        return
    with _exit_codes():
        try:
            config = config_errors.load(_files(files), os.environ)
        except ConfigError:  # engines must not outlive a wrong file: the folders are then where systemd or the defaults have them
            config = config_errors.load((), os.environ)
        logs.set_up("warning", config.log.format, False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            count = runner.run(daemon.end_engines(config))
        click.echo(f"{count} engines were left: ended" if count else "no engine was left", err=True)


@main.command("schema")
def schema() -> None:
    """Print the JSON Schema of a config file, for editors: `orchestratord schema > orchestrator.schema.json`."""
    click.echo(json.dumps(settings.schema(), indent=2))


def _files(files: tuple[Path, ...]) -> tuple[Path, ...]:
    return files or ((DEFAULT_CONFIG,) if DEFAULT_CONFIG.exists() else ())


def _checked(files: tuple[Path, ...]) -> Settings:
    """Raises ConfigError, also for a model whose folder is not there."""
    config, source = config_errors.read(files, os.environ)
    sources = Sources(dict(os.environ))
    found = ((name, sources.problem(spec)) for name, spec in config.models.items())
    if missing := [source.problem(f"models.{name}.source", why) for name, why in found if why]:
        raise ConfigError(missing)
    return config


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except OrchestratorError as error:
        for problem in error.problems or (Problem("", error.message),):
            click.echo(f"orchestratord: {problem}", err=True)
        sys.exit(error.exit_code)
