"""orchestratord: the composition root. Builds each part once, runs the loop and the two servers together, stops them in order.

Order of the end: new requests are refused, engines finish what they have and are ended, then the servers, then the store. Engines
outlive a daemon that is killed, or told to keep them; the next one adopts them.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import __version__, doctor, garbage, logs, premises
from orchestrator.api import access, projections
from orchestrator.api.admin import About, Admin
from orchestrator.api.app import UsersApp, operators, operators_app
from orchestrator.api.board import Board
from orchestrator.api.bodies import Bodies
from orchestrator.api.daemon import DaemonApi
from orchestrator.api.desired import DesiredApi
from orchestrator.api.engine_metrics import EngineMetrics
from orchestrator.api.events import EventsApi
from orchestrator.api.fate import Fates
from orchestrator.api.keys import KeysApi
from orchestrator.api.merged_logs import LogsApi
from orchestrator.api.metrics import Metrics
from orchestrator.api.openai import forwarded, models_router
from orchestrator.api.page import Page
from orchestrator.api.peers import Group, Peers
from orchestrator.api.proxy import Proxy
from orchestrator.api.pull import PullApi
from orchestrator.api.realtime import Realtime
from orchestrator.api.server import Server
from orchestrator.api.through import Through
from orchestrator.api.upstream import Upstreams
from orchestrator.api.viewing import Viewing, chat
from orchestrator.control.counts import Counts
from orchestrator.control.history import History
from orchestrator.control.keys import Keys
from orchestrator.control.ledger import Ledger
from orchestrator.control.observe import Observer
from orchestrator.control.reconciler import Reconciler, View
from orchestrator.control.registry import Registry
from orchestrator.control.traffic import Traffic
from orchestrator.drivers import processes, sockets, systemd, vllm
from orchestrator.drivers.launcher import Launcher
from orchestrator.drivers.nvml import Nvml
from orchestrator.drivers.pulls import Pulls
from orchestrator.drivers.sources import Sources
from orchestrator.drivers.store import SqliteStore
from orchestrator.ending import SIGNALS, Ending
from orchestrator.front import Front
from orchestrator.reload import Reload, warnings
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.api.traces import Traces

log = logging.getLogger("orchestrator")

DEFAULT_GROUP = "orchestrator"  # of the package and its service unit
LAST_WORDS_S = 1.0  # a connection was made and its request is on the way: it would be closed as an idle one
DROP_EVERY = 720  # looks at logs: an hour
LOGS_S = 5.0  # how often logs are looked at: one system call each


async def serve(config: Settings, files: Sequence[Path]) -> Ending:
    """Until SIGTERM or SIGINT, the end of its terminal, or an operator's word: how it is to go on then. Raises StartupError, with nothing
    started, where this machine does not allow it."""
    ending = Ending()
    ending.heed_signals()
    premises.allow_files()
    handed = systemd.handed_socket()
    async with premises.house(config) as (store, admin):
        group = sockets.group(config.admin.group, DEFAULT_GROUP)
        keys = Keys(config.keys.required)
        ledger = Ledger(keys, store)
        await ledger.load()
        front = Front(config.listen.host, config.listen.port, keys, handed)
        await _run(config, files, store, ledger, keys, front, admin, Peers(Group(*group) if group else None), ending)
    if ending.restart:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the next one heeds them: nothing is lost in between
    return ending


async def end_engines(config: Settings) -> int:
    """Those that a daemon left running which is gone: ended, and cleaned up after. How many. Raises StartupError while one is there."""
    async with premises.house(config) as (store, _):
        looked = asyncio.Event()
        launcher = Launcher(premises.venvs(config, config.gpus.source), config.runtime_dir, config.logs_dir, store, looked.set)
        await launcher.adopt()
        left = launcher.look()
        for launch_id in left:
            launcher.stop(launch_id)
        while not all(seen.gone for seen in launcher.look().values()):
            looked.clear()
            await looked.wait()
        return len(left)


async def _run(
    config: Settings,
    files: Sequence[Path],
    store: SqliteStore,
    ledger: Ledger,
    keys: Keys,
    front: Front,
    admin_socket: socket.socket,
    peers: Peers,
    ending: Ending,
) -> None:
    started_at = time.monotonic()
    with contextlib.suppress(OSError):  # where that is forbidden they are init's, and how they end stays unknown
        processes.adopt_orphans()
    gpus, gpu_source = premises.gpus(config)
    wake = asyncio.Event()
    rules = premises.rules(config)
    venvs = premises.venvs(config, gpu_source)
    versions = {name: vllm.version(venv) for name, venv in venvs.items()}
    sources = Sources(dict(os.environ))
    registry = Registry(store, sources, config.models.values(), config.engines, rules, versions=lambda engine: versions.get(engine, ""))
    await registry.load()
    launcher = Launcher(venvs, config.runtime_dir, config.logs_dir, store, wake.set, config.memory.limit_writer)
    traces = _traces(config)
    counts = Counts(traces.move if traces else None)
    tells = [*([access.told] if config.log.access else []), *([traces.request] if traces else [])]
    fates = Fates(counts, tells, spans=config.traces.sample if traces else None)
    traffic = Traffic(wake.set, config.requests.max_wait, max_queue=config.requests.max_queue, counts=counts)
    observer = Observer(gpus, launcher, traffic.seen, time.monotonic)
    upstreams = Upstreams(launcher.socket)
    proxy = Proxy(traffic, registry.resolve, upstreams, keys, Bodies(config.requests.max_body, config.requests.max_bodies), fates)
    realtime = Realtime(traffic, registry.resolve, launcher.socket, keys, fates)
    history = History(time.time() - time.monotonic())

    def looked(view: View) -> None:
        _feed_systemd(view)
        history.look(view)

    loop = Reconciler(registry, traffic, launcher, observer, store, rules, config.loop.interval, wake, looked, counts)

    about = About(
        listen=lambda: front.url,
        admin_socket=str(config.admin_socket),
        gpu_source=gpu_source,
        config=tuple(map(str, files)),
        state_dir=str(config.state_dir),
        state_problem=lambda: store.problem,
        phases=vllm.PHASES,
        started_at=started_at,
        host_budget_bytes=rules.host_budget_bytes,
        engines={name: projections.venv(each.kind, each.python, each.args, each.env, versions[name]) for name, each in venvs.items()},
    )
    who = processes.who
    models = Admin(registry, loop, about, launcher.socket, launcher.log_file, store.events, who, launcher.launch_servers)

    def heed(changed: Settings) -> None:
        """What a reload may change besides models."""
        rules = premises.rules(changed)
        registry.heed(rules)
        loop.heed(rules, changed.loop.interval)
        traffic.heed(changed.requests.max_wait, changed.requests.max_queue)
        models.heed(rules.host_budget_bytes)
        logs.set_up(changed.log.level, changed.log.format, config.log.access)
        wake.set()

    def look() -> list[dict[str, str]]:
        readings = tuple(loop.view.snapshot.gpus.values()) if loop.view else ()
        return [found.shown() for found in doctor.examine(reload.now, lambda: readings, gpu_source == "simulated")]

    reload = Reload(config, files, registry, loop, heed)

    async def may_start() -> None:
        await asyncio.to_thread(premises.check, await reload.read())

    keys_api, daemon_api = KeysApi(ledger, registry.resolve, front.widen), DaemonApi(reload, may_start, ending.begin_again, look)
    through = Through(proxy, registry.resolve, loop)
    engine_metrics = EngineMetrics(upstreams, lambda: loop.view)
    metrics = Metrics(
        registry,
        loop,
        counts,
        engine_metrics,
        gpu_source,
        state_problem=lambda: store.problem,
        launch_servers=launcher.launch_servers,
        sleepers_limit=lambda: premises.rules(reload.now).host_budget_bytes,
    )
    desired, events, pull = DesiredApi(registry, loop), EventsApi(store), PullApi(pulls := Pulls(venvs), registry)
    merged = LogsApi(lambda: projections.names(registry.known(), loop.view), registry.resolve, launcher.log_files)
    routes = (models, desired, events, pull, merged, keys_api, daemon_api, metrics, through)
    admin = operators(*(each.router() for each in routes))
    boot = time.time()
    key = config.admin_key.get_secret_value() if config.admin.tcp and config.admin_key else None
    engines_routes, page = forwarded(proxy, realtime), Page()
    board = Board(registry, loop, counts, history, store.events)
    shown = {"page": page.version, "gpu_source": gpu_source, "admin_socket": str(config.admin_socket), "admin_tcp": key is not None}
    viewing = Viewing(board, keys, lambda: shown, key)
    open_routers = [models_router(registry, loop, lambda: boot, keys), page.router(), viewing.users()]
    if config.metrics.local:
        open_routers.append(metrics.local(key))
    users = UsersApp(open_routers, engines_routes, admin, key)
    operators_all = operators(admin, viewing.operators(), chat({route.path: app for route, app in engines_routes.items()}))
    front.server = Server(users, proxy.direct)
    servers = [(front.server, front.socket), (Server(operators_app(operators_all, peers, page.router())), admin_socket)]

    for warning in warnings(registry):
        log.warning("%s", warning)
    loop.adopt(await launcher.adopt(), time.monotonic())
    launcher.warm({known.spec.engine for known in registry.known().values()})
    await loop.tick()  # a first look, so that whoever connects finds figures
    reconciling = asyncio.create_task(loop.run(), name="loop")
    serving = [asyncio.create_task(server.serve([sock]), name="server") for server, sock in servers]
    chores = [
        asyncio.create_task(_tidy(loop, upstreams), name="tidy"),
        asyncio.create_task(ledger.run(), name="usage"),
        asyncio.create_task(_cap_logs(launcher, config.log.engine_max, registry.known), name="logs"),
        asyncio.create_task(garbage.collect(), name="garbage"),
    ]
    garbage.settle()
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
    ending.reload_by(reload)
    systemd.notify(f"READY=1\nSTATUS=serving {front.url}")

    asked = asyncio.create_task(ending.asked.wait())
    await asyncio.wait([asked, reconciling, *serving], return_when=asyncio.FIRST_COMPLETED)
    viewing.close()
    if ending.restart:
        ending.listening = front.kept()  # who comes meanwhile waits for the next daemon
        systemd.reloading("restarting")
    else:
        systemd.notify("STOPPING=1")
    if ending.keep_engines:
        await _finish_requests(front.server, serving[0], reload.now.requests.drain_timeout, ending)
    if not ending.keep_engines:
        log.info("%s: engines finish their requests and are ended", "restarting" if ending.restart else "stopping")
        loop.stop()
        await reconciling
    events.close()
    merged.close()
    for server, _ in servers:
        server.stop()
    await asyncio.gather(*serving)
    for task in (reconciling, *chores):
        task.cancel()
    await pulls.close()
    await ledger.close()
    upstreams.tidy(())
    await loop.settle()
    await launcher.close()
    if traces:
        traces.close()
    if isinstance(gpus, Nvml):
        gpus.close()  # it would be a stranger's child of the successor
    log.info("starting again" if ending.restart else "stopped")


async def _finish_requests(server: Server, serving: "asyncio.Task[None]", drain_s: float, ending: Ending) -> None:
    """Those that run end, within the drain time; nobody else is let in. The loop goes on meanwhile: they need their memory."""
    log.info("restarting: requests that run are finished, engines go on")
    server.stop_listening()
    await asyncio.sleep(LAST_WORDS_S)
    server.config.timeout_graceful_shutdown = max(1, round(drain_s))
    server.stop()
    stopped = asyncio.create_task(ending.stopped.wait())  # somebody has lost patience
    await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()


def _seen(loop: Reconciler) -> Sequence[str]:
    return tuple(loop.view.snapshot.gpus) if loop.view else ()


async def _tidy(loop: Reconciler, upstreams: Upstreams) -> None:
    """Close connections to engines that nobody uses any more."""
    while True:
        async with loop.ticked:
            await loop.ticked.wait()
        if loop.view is not None:
            upstreams.tidy({i.launch.id for i in loop.view.plan.instances.values() if i.launch})


async def _cap_logs(launcher: Launcher, most_bytes: int, models: Callable[[], Iterable[str]]) -> None:
    """No log of an engine fills the disk, and those of models that are gone do not stay for ever."""
    for turn in itertools.count(1):
        await asyncio.sleep(LOGS_S)
        await launcher.cap_logs(most_bytes)
        if turn % DROP_EVERY == 0:
            await launcher.drop_logs(models())


def _feed_systemd(view: View) -> None:
    """The loop that decides feeds the watchdog: a daemon whose loop hangs is restarted, whatever else still answers."""
    states: dict[str, int] = {}
    for instance in view.plan.instances.values():
        states[instance.state.value] = states.get(instance.state.value, 0) + 1
    systemd.notify("WATCHDOG=1\nSTATUS=" + (", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no models"))


def _traces(config: Settings) -> "Traces | None":
    if config.traces.endpoint is None:
        return None
    from orchestrator.api.traces import Traces  # of an extra: without the setting nothing of it is loaded

    return Traces(config.traces.endpoint)


def main(words: Sequence[str] | None = None) -> None:
    """The command `orchestratord`."""
    from orchestrator.commands import main as command  # which needs all of the above

    command(words)


if __name__ == "__main__":
    main()
