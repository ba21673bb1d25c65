"""orchestratord: the composition root. Builds each part once, runs the loop and the two servers together, stops them in order.

Order of the end: new requests are refused, engines finish what they have and are ended, then the servers, then the store. An
engine outlives the daemon only if the daemon is killed; the next one adopts it.
"""

import asyncio
import contextlib
import fcntl
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import uvloop

from orchestrator import __version__, config_errors, logs, settings
from orchestrator.api.admin import About, Admin
from orchestrator.api.app import UsersApp, operators, operators_app
from orchestrator.api.keys import KeysApi
from orchestrator.api.openai import forwarded, models_router
from orchestrator.api.peers import Group, Peers
from orchestrator.api.proxy import Proxy
from orchestrator.api.realtime import Realtime
from orchestrator.api.server import Server
from orchestrator.api.through import Through
from orchestrator.api.upstream import Upstreams
from orchestrator.control.keys import Keys
from orchestrator.control.ledger import Ledger
from orchestrator.control.observe import Observer
from orchestrator.control.ports import Gpus
from orchestrator.control.reconciler import Reconciler, View
from orchestrator.control.registry import Registry
from orchestrator.control.traffic import Traffic
from orchestrator.drivers import processes, sockets, systemd, vllm
from orchestrator.drivers.launcher import Launcher
from orchestrator.drivers.nvml import Nvml
from orchestrator.drivers.simgpu import SimGpus
from orchestrator.drivers.sources import Sources
from orchestrator.drivers.store import SqliteStore
from orchestrator.errors import ConfigError, OrchestratorError, Problem, StartupError
from orchestrator.policy.lifecycle import Rules
from orchestrator.settings import Settings

log = logging.getLogger("orchestrator")

DEFAULT_CONFIG = Path("/etc/orchestrator/orchestrator.yaml")
DEFAULT_GROUP = "orchestrator"  # of the package and its service unit
GC_EVERY = 20_000  # objects: collections were a twelfth of a busy daemon's time at Python's 700, and next to nothing here is a cycle


async def serve(config: Settings, files: Sequence[Path]) -> None:
    """Until SIGTERM, SIGINT or SIGHUP. Raises StartupError, with nothing started, where this machine does not allow it."""
    with contextlib.ExitStack() as held:
        for folder, mode in (
            (config.state_dir, 0o750),
            (config.runtime_dir, 0o755),
            (config.runtime_dir / "engines", 0o700),
            (config.logs_dir, 0o750),
        ):
            _make(folder, mode)
        held.enter_context(_lock(config.state_dir))
        held.enter_context(_lock(config.runtime_dir))
        admin = held.enter_context(sockets.listen_unix(config.admin_socket))
        group = sockets.group(config.admin.group, DEFAULT_GROUP)
        store = SqliteStore(config.state_dir / "state.db")
        await store.open()
        try:
            keys = Keys(config.keys.required)
            ledger = Ledger(keys, store)
            await ledger.load()
            front = Front(config.listen.host, config.listen.port, keys)
            await _run(config, files, store, ledger, keys, front, admin, Peers(Group(*group) if group else None))
        finally:
            await store.close()


class Front:
    """Where users reach us: where the settings say, but on loopback alone as long as anybody there would be served without a key."""

    def __init__(self, host: str, port: int, keys: Keys) -> None:
        self._wanted = host
        self.is_narrow = not sockets.is_loopback(host) and not keys.needed and keys.required != "never"
        self.server: Server | None = None
        self._listen(sockets.loopback_of(host) if self.is_narrow else host, port)

    async def widen(self) -> None:
        """A key was made. Connections that are open stay."""
        if not self.is_narrow or self.server is None:
            return
        self.server.stop_listening()  # the kernel gives no port of all addresses while somebody listens on it at one
        for host in (self._wanted, sockets.loopback_of(self._wanted)):
            try:
                self._listen(host, self.port)
            except StartupError as error:  # the key is made all the same
                log.error("not listening on %s: %s; the next key, or a restart, tries again", host, error)
                continue
            self.is_narrow = host != self._wanted
            log.info("there is an API key now: listening on %s", self.url)
            await self.server.startup([self.socket])
            return

    def _listen(self, host: str, port: int) -> None:
        """Raises StartupError."""
        self.socket = sockets.listen(host, port)
        self.port, self.url = self.socket.getsockname()[1], sockets.url_of(self.socket)


async def _run(
    config: Settings,
    files: Sequence[Path],
    store: SqliteStore,
    ledger: Ledger,
    keys: Keys,
    front: Front,
    admin_socket: socket.socket,
    peers: Peers,
) -> None:
    started_at = time.monotonic()
    with contextlib.suppress(OSError):  # where that is forbidden they are init's, and how they end stays unknown
        processes.adopt_orphans()
    gpus, gpu_source = _gpus(config)
    wake = asyncio.Event()
    sleepers = config.memory.sleepers if config.memory.sleepers is not None else processes.host_bytes() // 2
    rules = Rules(config.memory.reserve, config.requests.drain_timeout, sleepers)
    venvs = _venvs(config, gpu_source)
    versions = {name: vllm.version(venv) for name, venv in venvs.items()}
    sources = Sources(dict(os.environ))
    registry = Registry(store, sources, config.models.values(), config.engines, rules, versions=lambda engine: versions.get(engine, ""))
    await registry.load()
    launcher = Launcher(venvs, config.runtime_dir, config.logs_dir, store, wake.set, config.memory.limit_writer)
    traffic = Traffic(wake.set, config.requests.max_wait, max_queue=config.requests.max_queue)
    observer = Observer(gpus, launcher, traffic.seen, time.monotonic)
    upstreams = Upstreams(launcher.socket)
    proxy = Proxy(traffic, registry.resolve, upstreams, keys, config.requests.max_body)
    realtime = Realtime(traffic, registry.resolve, launcher.socket, keys)
    loop = Reconciler(registry, traffic, launcher, observer, store, rules, config.loop.interval, wake, on_tick=_feed_systemd)

    about = About(
        listen=lambda: front.url,
        admin_socket=str(config.admin_socket),
        gpu_source=gpu_source,
        config=tuple(map(str, files)),
        state_dir=str(config.state_dir),
        phases=vllm.PHASES,
        started_at=started_at,
        host_budget_bytes=rules.host_budget_bytes,
    )
    who = processes.who
    admin = Admin(registry, loop, about, launcher.socket, launcher.log_file, store.events, who, launcher.launch_servers).router()
    admin.include_router(KeysApi(ledger, registry.resolve, front.widen).router())
    admin = operators(admin, Through(proxy, registry.resolve, loop).router())
    boot = time.time()
    key = config.admin.key.get_secret_value() if config.admin.tcp and config.admin.key else None
    users = UsersApp([models_router(registry, loop, lambda: boot, keys)], forwarded(proxy, realtime), admin, key)
    front.server = Server(users, config.log.access)
    servers = [(front.server, front.socket), (Server(operators_app(admin, peers), config.log.access), admin_socket)]

    for name in registry.overruled:
        log.warning("%s: a config file defines this name now; the one added by API is not used", name)
    for name in registry.dropped:
        log.warning("%s: what `orchestratorctl limit` changed no longer goes with its spec and is not used", name)
    for problem in registry.source_problems():
        log.warning("%s", problem)
    stop = asyncio.Event()
    running = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # SIGHUP: the terminal was closed; engines must not outlive that
        running.add_signal_handler(number, stop.set)
    loop.adopt(await launcher.adopt(), time.monotonic())
    launcher.warm({known.spec.engine for known in registry.known().values()})
    await loop.tick()  # a first look, so that whoever connects finds figures
    reconciling = asyncio.create_task(loop.run(), name="loop")
    serving = [asyncio.create_task(server.serve([sock]), name="server") for server, sock in servers]
    tidying = asyncio.create_task(_tidy(loop, upstreams), name="tidy")
    writing = asyncio.create_task(ledger.run(), name="usage")
    gc.collect()
    gc.freeze()  # what is there now stays: no collection needs to look at it again
    gc.set_threshold(GC_EVERY, 20, 20)
    log.info("serving %s, admin at %s, %s GPUs (%s), version %s", front.url, config.admin_socket, len(_seen(loop)), gpu_source, __version__)
    if front.is_narrow:
        log.warning(
            "nobody has an API key yet, so this is loopback and not listen.host (%s): `orchestratorctl keys create NAME` makes a key, and"
            " from then on whoever has one is served there, too",
            config.listen.host,
        )
    elif not keys.needed and not sockets.is_loopback(config.listen.host):
        log.warning("keys.required is never: whoever reaches %s may use every model", front.url)
    if gpu_source == "simulated":
        log.warning("the GPUs are SIMULATED: engines are simulated too, and answers are made up")
    systemd.notify(f"READY=1\nSTATUS=serving {front.url}")

    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, reconciling, *serving], return_when=asyncio.FIRST_COMPLETED)
    systemd.notify("STOPPING=1")
    log.info("stopping: engines finish their requests and are ended")
    loop.stop()
    await reconciling
    for server, _ in servers:
        server.stop()
    await asyncio.gather(*serving)
    tidying.cancel()
    writing.cancel()
    await ledger.close()
    upstreams.tidy(())
    await loop.settle()
    await launcher.close()
    log.info("stopped")


def _seen(loop: Reconciler) -> Sequence[str]:
    return tuple(loop.view.snapshot.gpus) if loop.view else ()


async def _tidy(loop: Reconciler, upstreams: Upstreams) -> None:
    """Close connections to engines that nobody uses any more."""
    while True:
        async with loop.ticked:
            await loop.ticked.wait()
        if loop.view is not None:
            upstreams.tidy({i.launch.id for i in loop.view.plan.instances.values() if i.launch})


def _feed_systemd(view: View) -> None:
    """The loop that decides feeds the watchdog: a daemon whose loop hangs is restarted, whatever else still answers."""
    states: dict[str, int] = {}
    for instance in view.plan.instances.values():
        states[instance.state.value] = states.get(instance.state.value, 0) + 1
    systemd.notify("WATCHDOG=1\nSTATUS=" + (", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no models"))


def _gpus(config: Settings) -> tuple[Gpus, str]:
    chosen = config.gpus.source
    if chosen != "simulated":
        try:
            return Nvml(), "nvml"
        except OSError as error:
            if chosen == "nvml":
                raise StartupError(str(error)) from None
            log.warning("%s; taking simulated GPUs (gpus.source: auto)", error)
    folder = config.runtime_dir / "simgpu"
    os.environ["SIM_GPU_DIR"] = str(folder)  # engines inherit it
    return SimGpus(folder, config.gpus.simulated.count, config.gpus.simulated.memory), "simulated"


def _venvs(config: Settings, gpu_source: str) -> dict[str, vllm.EngineVenv]:
    """On simulated GPUs every engine is a simulated one: real ones would not start."""
    return {
        name: vllm.EngineVenv(
            kind="simulated" if gpu_source == "simulated" else engine.kind,
            python=engine.python if engine.kind == "vllm" and gpu_source != "simulated" else Path(sys.executable),
            env=engine.env,
            args=engine.args,
            stop_grace_s=engine.stop_grace,
            launch_server=engine.launch_server,
        )
        for name, engine in config.engines.items()
    }


def _make(folder: Path, mode: int) -> None:
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StartupError(
            f"{folder}: {error.strerror}: make it writable for this user, or choose another one under dirs in the config"
        ) from None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One daemon a folder. The kernel gives the lock back however the holder ends."""
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StartupError(f"{folder} is in use by another orchestratord (pid {holder}): stop it, or choose other dirs") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


# ---- the command ------------------------------------------------------------------------------------------------------

CONFIG = click.option(
    "--config", "-c", "files", multiple=True, type=click.Path(path_type=Path), envvar="ORCH_CONFIG",
    help=f"Config file; may be given more than once, later ones add and override. Default: {DEFAULT_CONFIG} if it exists.",
)  # fmt: skip


def _load(files: tuple[Path, ...]) -> tuple[Settings, tuple[Path, ...]]:
    if not files and DEFAULT_CONFIG.exists():
        files = (DEFAULT_CONFIG,)
    return config_errors.load(files, os.environ), files


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="orchestratord")
def main() -> None:
    """The daemon that shares GPUs between many language models.

    Settings come from the environment (ORCH_LISTEN__PORT=9000), then --config files, then defaults. Exit codes: 0 stopped in
    order, 1 this machine does not allow it (folder locked, port in use), 78 the configuration is wrong.
    """


@main.command("serve")
@CONFIG
def serve_command(files: tuple[Path, ...]) -> None:
    """Run in the foreground until SIGTERM, Ctrl-C or the end of the terminal, which end the engines too.

    Example: orchestratord serve --config config/orchestrator.yaml --config config/models.yaml
    """
    with _exit_codes():
        config, files = _load(files)
        logs.set_up(config.log.level, config.log.format, config.log.access)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config, files))


@main.command("check-config")
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON on stdout.")
def check_config(files: tuple[Path, ...], as_json: bool) -> None:
    """Read the configuration and say everything that is wrong with it: file, line, nearest right name. Exit code 78 if anything is."""
    try:
        config, files = _load(files)
        sources = Sources(dict(os.environ))
        missing = [Problem(f"models.{name}.source", why) for name, spec in config.models.items() if (why := sources.problem(spec))]
        if missing:
            raise ConfigError(missing)
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


@main.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of a config file, for editors: `orchestratord schema > orchestrator.schema.json`."""
    click.echo(json.dumps(settings.schema(), indent=2))


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except OrchestratorError as error:
        for problem in error.problems or (Problem("", error.message),):
            click.echo(f"orchestratord: {problem}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
