"""Real (simulated) engines that live on: told a limit anew, trimmed when idle, their segment repaired, and limits by kvctl."""

import asyncio
import struct
import sys
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from orchestrator.drivers import kvcached, launcher, upkeep
from orchestrator.policy.snapshot import Segment
from tests.support.eventually import eventually
from tests.support.simulated import BUNDLE, CEILING, Workshop

pytestmark = pytest.mark.asyncio


def segment(shop: Workshop, launch_id: str) -> Segment:
    found = shop.launcher.look()[launch_id].segment
    assert found is not None
    return found


async def acked(shop: Workshop, launch_id: str, limit: int) -> None:
    await eventually(lambda: shop.launcher.look()[launch_id].acked_limit_bytes == limit, f"{limit} is taken")


# ---- a limit is told until it holds ---------------------------------------------------------------------------------


async def test_a_limit_counts_as_taken_only_when_no_allocation_can_undo_it(shop: Workshop) -> None:
    """The engine's watcher looks every 0.1 s; an allocation before that puts the old limit back."""
    launch = await shop.started()
    for limit in (20 * BUNDLE, 4 * BUNDLE, 12 * BUNDLE):
        shop.launcher.set_limit(launch.id, limit)
        while shop.seen(launch).acked_limit_bytes != limit:
            await shop.complete(launch)  # allocations all the while
        await shop.complete(launch)
        assert (await shop.api(launch).rpc("kv_status"))["limit_bytes"] == limit


async def test_a_limit_that_a_stranger_lowered_is_told_anew_although_it_once_held(shop: Workshop) -> None:
    """`kvctl limit` by hand: the engine obeys at its next allocation, and a starved one would never see the segment raised."""
    launch = await shop.started()
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    await acked(shop, launch.id, 10 * BUNDLE)
    kvcached.write_limit(launch.ipc_name, 2 * BUNDLE)
    async with asyncio.timeout(20):
        while (await shop.api(launch).rpc("kv_status"))["limit_bytes"] != 2 * BUNDLE:
            await shop.complete(launch)
    request = asyncio.ensure_future(shop.complete(launch, prompt="x" * 3000))
    await shop.until_waiting(launch)
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    assert shop.seen(launch).acked_limit_bytes != 10 * BUNDLE  # not sure any more
    assert await asyncio.wait_for(request, 20) == "tiny"
    await acked(shop, launch.id, 10 * BUNDLE)


async def test_there_and_back_before_the_first_step_was_settled(shop: Workshop) -> None:
    launch = await shop.started()
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    await acked(shop, launch.id, 10 * BUNDLE)
    for _ in range(5):
        shop.launcher.set_limit(launch.id, 2 * BUNDLE)
        async with asyncio.timeout(20):
            while (await shop.api(launch).rpc("kv_status"))["limit_bytes"] != 2 * BUNDLE:
                pass  # it obeys, and its watcher may not have seen it
        shop.launcher.set_limit(launch.id, 10 * BUNDLE)
        await acked(shop, launch.id, 10 * BUNDLE)
        assert (await shop.api(launch).rpc("kv_status"))["limit_bytes"] == 10 * BUNDLE


# ---- trim -----------------------------------------------------------------------------------------------------------


async def test_trim_gives_back_the_prefix_cache_and_the_reserve(shop: Workshop) -> None:
    launch = await shop.started()
    await shop.complete(launch, prompt="x" * 7000, max_tokens=1)
    assert segment(shop, launch.id).mapped_bytes > 5 * BUNDLE  # 7000 tokens are kept for the next one that begins alike
    used = shop.used_bytes()
    shop.launcher.trim(launch.id)
    await eventually(lambda: segment(shop, launch.id).mapped_bytes == BUNDLE, "one bundle, the null block's")
    assert shop.used_bytes() <= used - 5 * BUNDLE
    assert await shop.complete(launch) == "tiny"


@pytest.mark.parametrize("error", [httpx2.ReadTimeout("30 s"), KeyError("results"), ConnectionResetError()])
async def test_a_trim_that_fails_is_told_and_the_engine_goes_on(
    shop: Workshop, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise error

    launch = await shop.started()
    monkeypatch.setattr(upkeep, "RETRY_S", 0.0)
    monkeypatch.setattr(shop.api(launch), "reset_prefix_cache", fail)
    shop.launcher.trim(launch.id)
    await eventually(lambda: f"tiny: trim failed: {type(error).__name__}" in caplog.text, "it is told")
    assert (shop.seen(launch).error, shop.seen(launch).ready) == (None, True)
    monkeypatch.undo()

    def given_back() -> bool:
        shop.launcher.trim(launch.id)
        return segment(shop, launch.id).prealloc_bytes == 0

    await eventually(given_back, "and may be asked again")


# ---- repair ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "truncated", "longer"])
async def test_a_segment_is_made_anew_with_what_the_engine_says(shop: Workshop, how: str) -> None:
    launch = await shop.started()
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    await acked(shop, launch.id, 10 * BUNDLE)
    path = kvcached.SHM / launch.ipc_name
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"\xff" * (8 if how == "truncated" else 4096))
    assert shop.seen(launch).segment is None
    shop.launcher.repair(launch.id)
    await eventually(lambda: shop.seen(launch).segment, "it is there again")
    status = await shop.api(launch).rpc("kv_status")
    found = segment(shop, launch.id)
    assert (found.limit_bytes, found.used_bytes, found.mapped_bytes) == (10 * BUNDLE, status["used_bytes"], status["mapped_bytes"])
    assert len(path.read_bytes()) == 24
    assert await shop.complete(launch, prompt="x" * 3000) == "tiny"
    assert segment(shop, launch.id).limit_bytes == 10 * BUNDLE
    shop.launcher.set_limit(launch.id, 4 * BUNDLE)
    await acked(shop, launch.id, 4 * BUNDLE)
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []


# ---- limits by kvctl ------------------------------------------------------------------------------------------------

KVCTL = f"""#!{sys.executable}
import os, struct, sys, time
verb, name, size = sys.argv[1:]
assert verb == "limit", verb
with open({{said!r}}, "a") as log:
    print(*sys.argv[1:], file=log)
time.sleep({{pause}})
if {{works}}:
    with open("/dev/shm/" + name, "r+b" if os.path.exists("/dev/shm/" + name) else "w+b") as file:
        file.write(struct.pack("=q", int(size)))
else:
    print("No enough free space")
"""


class Kvctl:
    """A kvctl beside the Python of an engine venv. `calls` are its command lines."""

    def __init__(self, shop: Workshop, works: bool = True, pause: float = 0.0) -> None:
        self._said, folder = shop.root / "kvctl.said", shop.root / "venv/bin"
        folder.mkdir(parents=True)
        self.path = folder / "kvctl"
        self.path.write_text(KVCTL.format(said=str(self._said), works=works, pause=pause))
        self.path.chmod(0o755)
        shop.venvs["default"] = replace(shop.venvs["default"], python=folder / "python")
        shop.launcher = launcher.Launcher(shop.venvs, shop.root / "run", shop.root / "logs", shop.records, shop._notify, "kvctl")

    def calls(self) -> list[str]:
        return self._said.read_text().splitlines() if self._said.exists() else []


async def test_kvctl_writes_the_limit_and_the_engine_is_told(shop: Workshop) -> None:
    kvctl = Kvctl(shop)
    launch = await shop.started()
    await acked(shop, launch.id, CEILING)
    assert kvctl.calls() == []  # what it started with needs no call of 3 s
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    await acked(shop, launch.id, 10 * BUNDLE)
    assert kvctl.calls() == [f"limit {launch.ipc_name} {10 * BUNDLE}"]
    assert segment(shop, launch.id).limit_bytes == 10 * BUNDLE
    assert (await shop.api(launch).rpc("kv_status"))["limit_bytes"] == 10 * BUNDLE


async def test_a_limit_that_was_changed_meanwhile_is_written_by_kvctl_again(shop: Workshop) -> None:
    kvctl = Kvctl(shop)
    launch = await shop.started()
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    await acked(shop, launch.id, 10 * BUNDLE)
    (kvcached.SHM / launch.ipc_name).write_bytes(struct.pack("=qqq", 0, 0, 0))
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    await acked(shop, launch.id, 10 * BUNDLE)
    assert segment(shop, launch.id).limit_bytes == 10 * BUNDLE
    assert len(kvctl.calls()) == 2


@pytest.mark.parametrize("fault", ["does nothing", "is no program"])
async def test_a_kvctl_that_fails_is_tried_again_and_never_taken_for_done(
    shop: Workshop, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real one exits 0 whatever happens, so what counts is what is read back."""
    monkeypatch.setattr(upkeep, "RETRY_S", 0.01)
    kvctl = Kvctl(shop, works=False)
    if fault == "is no program":
        kvctl.path.chmod(0o644)
    launch = await shop.started()
    await acked(shop, launch.id, CEILING)
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    await eventually(lambda: caplog.text.count("did not take its limit") >= 2, "tried twice")
    assert ("kvctl did not set it: No enough free space" in caplog.text) == (fault == "does nothing")
    seen = shop.seen(launch)
    assert (seen.acked_limit_bytes, seen.error, seen.ready) == (CEILING, None, True)
    assert await shop.complete(launch) == "tiny"
    kvctl.path.write_text(kvctl.path.read_text().replace("if False", "if True"))
    kvctl.path.chmod(0o755)
    await acked(shop, launch.id, 10 * BUNDLE)
    assert segment(shop, launch.id).limit_bytes == 10 * BUNDLE


async def test_a_kvctl_under_way_does_not_bring_back_the_segment_of_an_ended_engine(shop: Workshop) -> None:
    """kvctl makes a segment that is not there: it must be over before what the engine left is removed."""
    kvctl = Kvctl(shop, pause=30)
    launch = await shop.started()
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    await eventually(kvctl.calls, "kvctl runs")
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []
    assert shop.processes(str(kvctl.path)) == []


async def test_without_a_kvctl_in_its_venv_limits_are_written_directly(shop: Workshop) -> None:
    kvctl = Kvctl(shop)
    kvctl.path.unlink()
    launch = await shop.started()
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    assert segment(shop, launch.id).limit_bytes == 10 * BUNDLE
    await acked(shop, launch.id, 10 * BUNDLE)


async def test_a_link_in_the_place_of_a_segment_is_neither_read_nor_written(
    shop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    launch = await shop.started()
    precious = tmp_path / "precious"
    precious.write_bytes(b"\0" * 24)
    path = kvcached.SHM / launch.ipc_name
    path.unlink()
    path.symlink_to(precious)
    assert shop.seen(launch).segment is None
    with pytest.raises(OSError, match=r".+"):
        shop.launcher.set_limit(launch.id, BUNDLE)
    shop.launcher.repair(launch.id)
    await eventually(lambda: "repair failed: OSError" in caplog.text, "it was tried")
    assert precious.read_bytes() == b"\0" * 24
    for _ in range(20):  # as the loop does, fifty times a second: an engine that is dying must not fill the log
        shop.launcher.repair(launch.id)
    assert caplog.text.count("repair failed") == 1
