"""A daemon that was killed, and the next one: what still runs is taken over, what does not is cleaned up after."""

import asyncio
import os
import shutil
import signal

import psutil
import pytest

from orchestrator.drivers import kvcached, launcher, processes
from tests.support.eventually import eventually, eventually_now
from tests.support.simulated import BUNDLE, CEILING, Workshop

pytestmark = pytest.mark.asyncio


async def test_a_ready_engine_is_adopted_as_it_is(shop: Workshop) -> None:
    launch = await shop.started(aliases=["also"], kv_floor="16MiB", idle_timeout=None, gpus=[0, "GPU-x"], args=["--enforce-eager"])
    pid, pids = shop.pid(launch), shop.seen(launch).pids
    await shop.restart()
    assert await shop.launcher.adopt() == [launch]
    await shop.ready(launch)
    seen = shop.seen(launch)
    assert (seen.adopted, seen.pid, seen.pids) == (True, pid, pids)
    assert (seen.capacity_bytes, seen.bundle_bytes) == (CEILING, BUNDLE)
    assert await shop.complete(launch) == "tiny"
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []


async def test_a_limit_that_the_former_daemon_wrote_and_did_not_tell_is_told(shop: Workshop) -> None:
    launch = await shop.started()
    shop.launcher.set_limit(launch.id, 2 * BUNDLE)
    await eventually(lambda: shop.seen(launch).acked_limit_bytes == 2 * BUNDLE, "two bundles")
    kvcached.write_limit(launch.ipc_name, 10 * BUNDLE)
    await shop.restart()
    await shop.launcher.adopt()
    await shop.ready(launch)
    await eventually(lambda: shop.seen(launch).acked_limit_bytes == 10 * BUNDLE, "told")
    assert (await shop.api(launch).rpc("kv_status"))["limit_bytes"] == 10 * BUNDLE


async def test_what_an_engine_pinned_when_it_slept_is_known_of_one_that_is_awake_again(shop: Workshop) -> None:
    launch = await shop.started()
    shop.launcher.sleep(launch.id, 1)
    await eventually(lambda: shop.seen(launch).asleep, "asleep")
    shop.launcher.wake(launch.id)
    await eventually(lambda: not shop.seen(launch).asleep, "awake")
    pinned = shop.seen(launch).host_bytes
    await shop.restart()
    await shop.launcher.adopt()
    await shop.ready(launch)
    assert (shop.seen(launch).asleep, shop.seen(launch).host_bytes) == (False, pinned)
    assert pinned > 0


async def test_a_start_under_way_is_adopted_and_becomes_ready(shop: Workshop) -> None:
    launch = shop.start(fault="slow_start:0.5")
    await eventually(lambda: shop.records.kept.get(launch.id, {}).get("process"), "spawned")
    await shop.restart()
    assert await shop.launcher.adopt() == [launch]
    await shop.ready(launch)


async def test_a_record_without_a_pid_is_found_by_its_log(shop: Workshop) -> None:
    launch = await shop.started()
    pid = shop.pid(launch)
    shop.records.kept[launch.id]["process"] = None
    await shop.restart()
    assert await shop.launcher.adopt() == [launch]
    assert shop.pid(launch) == pid
    await shop.ready(launch)
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []


async def test_a_record_without_a_pid_whose_leader_is_dead_leaves_no_orphan(shop: Workshop) -> None:
    launch = await shop.started()
    pid, core = shop.pid(launch), shop.core(launch)
    shop.records.kept[launch.id]["process"] = None
    await shop.restart()
    os.kill(pid, signal.SIGKILL)
    shop._children[-1].wait()
    assert shop.processes(launch.id) == [core]
    assert await shop.launcher.adopt() == []
    await eventually(lambda: shop.leftovers(launch) == [], "the core is ended and cleaned up after")


async def test_an_intent_that_came_to_nothing_is_cleaned_up(shop: Workshop) -> None:
    launch = shop.start(fault="hang_at_start")
    await eventually(lambda: shop.records.kept.get(launch.id, {}).get("process"), "spawned")
    record = shop.records.kept[launch.id] | {"process": None}
    await shop.stopped(launch)
    shop.records.kept[launch.id] = record
    await shop.restart()
    assert await shop.launcher.adopt() == []
    await eventually(lambda: shop.leftovers(launch) == [], "cleaned up")


async def test_a_dead_engine_is_not_adopted_but_cleaned_up_after(shop: Workshop) -> None:
    launch = await shop.started()
    pids = shop.seen(launch).pids
    await shop.restart()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    shop._children[-1].wait()
    eventually_now(lambda: not shop.processes(launch.id), "dead")
    assert len(shop.leftovers(launch)) == 4  # segment, two folders, record: as after a SIGKILL
    assert await shop.launcher.adopt() == []
    await eventually(lambda: shop.seen(launch).gone, "gone")
    assert shop.leftovers(launch) == []


async def test_an_engine_whose_spec_another_version_wrote_is_taken_over_to_be_ended(shop: Workshop) -> None:
    launch = await shop.started()
    shop.records.kept[launch.id]["launch"]["spec"]["name"] = "x/logs"
    await shop.restart()
    (found,) = await shop.launcher.adopt()
    assert (found.id, found.spec.name) == (launch.id, "x/logs")
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []


async def test_an_engine_whose_api_server_died_meanwhile_leaves_no_orphan(shop: Workshop) -> None:
    launch = await shop.started()
    pid, core = shop.pid(launch), shop.core(launch)
    await shop.restart()
    os.kill(pid, signal.SIGKILL)
    shop._children[-1].wait()
    assert shop.processes(launch.id) == [core]
    assert await shop.launcher.adopt() == []
    await eventually(lambda: shop.leftovers(launch) == [], "the core is ended")


async def test_a_pid_of_before_the_machine_was_booted_is_nobody(shop: Workshop) -> None:
    launch = await shop.started()
    record = shop.records.kept[launch.id]
    await shop.stopped(launch)
    stranger, child = processes.spawn(["sleep", "1000"], {"PATH": "/usr/bin:/bin"}, shop.root / "stranger.log")
    try:
        shop.records.kept[launch.id] = record | {"process": [stranger.pid, stranger.create_time], "boot": "another boot"}
        await shop.restart()
        assert await shop.launcher.adopt() == []
        await eventually(lambda: shop.seen(launch).gone, "cleaned up")
        assert psutil.pid_exists(stranger.pid)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


async def test_two_engines_of_one_model_do_not_touch_each_other(shop: Workshop) -> None:
    first, second = shop.start(), shop.start()
    await asyncio.gather(shop.ready(first), shop.ready(second))
    shop.launcher.set_limit(first.id, 5 * BUNDLE)
    assert (segment := shop.seen(second).segment) is not None
    assert segment.limit_bytes == CEILING
    await shop.stopped(first)
    assert await shop.complete(second) == "tiny"
    assert shop.seen(second).error is None


async def test_an_engine_whose_folder_was_removed_cannot_be_reached_and_is_ended(shop: Workshop) -> None:
    launch = await shop.started()
    await shop.restart()
    shutil.rmtree(shop.root / "run/engines" / launch.id)
    assert await shop.launcher.adopt() == []
    await eventually(lambda: shop.seen(launch).gone, "gone")
    assert shop.leftovers(launch) == []


async def test_one_that_served_and_hangs_now_fails_soon(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SERVED_S", 0.3)
    launch = await shop.started()
    await eventually(lambda: shop.records.kept[launch.id].get("served"), "kept")
    await shop.restart()
    os.kill(shop.records.kept[launch.id]["process"][0], signal.SIGSTOP)
    assert await shop.launcher.adopt() == [launch]
    assert "it served under the former daemon, and has not answered this one" in await shop.failed(launch)


async def test_a_start_under_way_is_waited_for_as_any_start(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SERVED_S", 0.01)
    launch = shop.start(fault="slow_start:0.5")
    await eventually(lambda: shop.records.kept.get(launch.id, {}).get("process"), "spawned")
    await shop.restart()
    await shop.launcher.adopt()
    await shop.ready(launch)


async def test_of_two_engines_of_one_model_the_later_is_taken_over_and_the_other_ended(shop: Workshop) -> None:
    first = await shop.started()
    second = await shop.started()
    await shop.restart()
    assert await shop.launcher.adopt() == [second]
    await shop.ready(second)
    await eventually(lambda: shop.seen(first).gone, "the first is gone")
    assert shop.leftovers(first) == []
    assert await shop.complete(second) == "tiny"


async def test_a_launch_without_a_record_is_ended_and_cleaned_up_and_a_strangers_is_not(shop: Workshop) -> None:
    lost, kept = await shop.started("lost"), await shop.started("kept")
    theirs = shop.root / "other"
    stranger, child = processes.spawn(["sleep", "1000"], {"PATH": "/usr/bin:/bin"}, theirs / f"x.{'a' * 8}.log")
    try:
        (shop.root / "run/engines/not-a-launch").mkdir()
        (shop.root / "run/engines" / ("a" * 8)).mkdir()  # an id of ours whose log is in a folder that is not
        del shop.records.kept[lost.id]
        await shop.restart()
        assert await shop.launcher.adopt() == [kept]
        await eventually(lambda: shop.leftovers(lost) == [], "the lost one is gone")
        await shop.ready(kept)
        assert processes.alive(stranger)
        assert (shop.root / "run/engines/not-a-launch").is_dir()
    finally:
        child.kill()
        child.wait()


async def test_a_launch_server_that_hung_while_its_daemon_died_is_ended(shop: Workshop) -> None:
    log = shop.root / "logs/launch-server-default.log"
    server, child = processes.spawn(["sleep", "1000"], {"PATH": "/usr/bin:/bin"}, log)
    await shop.launcher.adopt()
    assert child.wait(10.0) == -signal.SIGKILL
    assert not processes.alive(server)


async def test_how_an_adopted_child_ends_is_known(shop: Workshop) -> None:
    """A daemon that became its own successor is the parent of its engines."""
    launch = await shop.started()
    await shop.restart()
    await shop.launcher.adopt()
    await shop.ready(launch)
    shop._children.clear()  # or the former handle would bury it
    os.kill(shop.pid(launch), signal.SIGKILL)
    assert "was killed by SIGKILL" in await shop.failed(launch)
