"""Events: which of them are told, and a stream that loses none, whenever it begins and however often it is cut."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.events import EventsApi
from orchestrator.drivers.store import SqliteStore
from orchestrator.policy.stored import Event
from tests.api.house import house

pytestmark = pytest.mark.asyncio
DEADLINE_S = 20.0


async def asked(events: EventsApi, **query: Any) -> Any:
    return await events.events(**{"tail": 100, "after": None, **query})


def streamed(answer: Any) -> Any:
    return aiter(answer.body_iterator)


async def following(stream: Any) -> list[str]:
    """The reasons in the next piece."""
    async with asyncio.timeout(DEADLINE_S):
        return [json.loads(line)["reason"] for line in (await anext(stream)).splitlines() if line]


async def test_tail_model_kind_and_since(folder: Path) -> None:
    async with house(folder, {"name": "a", "source": "org/a"}, {"name": "b", "source": "org/b"}) as at:
        every = (await at.operate("GET", "/events")).json
        assert every["newest"] == max(each["id"] for each in every["events"])
        assert (await at.operate("GET", "/events?tail=2")).json["events"] == every["events"][-2:]
        found = (await at.operate("GET", "/events?model=a&kind=ready&since=1h")).json
        assert [(each["model"], each["kind"]) for each in found["events"]] == [("a", "ready")]
        assert found["newest"] == every["newest"]
        for wrong in ("since=yesterday", "tail=-1", "after=-1"):
            assert (await at.operate("GET", f"/events?{wrong}")).status == 400


async def test_since_counts_back_from_now(folder: Path) -> None:
    store = SqliteStore(folder / "state.db")
    await store.open()
    await store.add_events([Event(1e9, "a", "ready", "long ago")])
    found = await asked(EventsApi(store), since="1h")
    assert (found["events"], found["newest"]) == ([], 1)
    await store.close()


async def test_a_stream_has_each_event_once_wherever_it_is_cut(folder: Path) -> None:
    store = SqliteStore(folder / "state.db")
    await store.open()
    events, told, last = EventsApi(store), list[str](), 0
    for n in range(40):
        adding = [asyncio.create_task(store.add_events([Event(1.0 + n, "a", "ready", f"{n}.{part}")])) for part in range(3)]
        stream = streamed(await asked(events, follow=True, after=last))  # begins anew in the middle of what is written
        while f"{n}.2" not in told:
            async with asyncio.timeout(DEADLINE_S):
                for line in filter(None, (await anext(stream)).splitlines()):
                    event = json.loads(line)
                    told.append(event["reason"])
                    last = event["id"]
        await stream.aclose()
        await asyncio.gather(*adding)
    assert told == [f"{n}.{part}" for n in range(40) for part in range(3)]
    await store.close()


async def test_a_stream_begins_with_the_tail_and_says_that_it_lives(folder: Path) -> None:
    store = SqliteStore(folder / "state.db")
    await store.open()
    await store.add_events([Event(1.0, name, "ready", f"{name}{n}") for n in range(3) for name in "ab"])
    events = EventsApi(store, alive_s=0.01)
    stream = streamed(await asked(events, follow=True, tail=2, model="a"))
    assert await following(stream) == ["a1", "a2"]
    assert await anext(stream) == b"\n"  # nothing happened: a blank line
    await store.add_events([Event(2.0, "b", "ready", "b3"), Event(2.0, "a", "ready", "a3")])
    while not (found := await following(stream)):
        pass
    assert found == ["a3"]
    await stream.aclose()
    await store.close()


async def test_ids_go_on_after_a_restart_and_one_from_the_future_waits_for_nothing(folder: Path) -> None:
    for n in range(2):
        store = SqliteStore(folder / "state.db")
        await store.open()
        await store.add_events([Event(1.0, "a", "ready", str(n))])
        assert [event.id for event in await store.events(None, 9)] == list(range(1, n + 2))
        stream = streamed(await asked(EventsApi(store), follow=True, after=1000))
        assert await following(stream) == []
        await store.add_events([])
        await stream.aclose()
        await store.close()


async def test_what_can_not_be_written_is_streamed_all_the_same(folder: Path) -> None:
    store = SqliteStore(folder / "state.db")
    await store.open()
    (folder / "state.db").rename(folder / "gone.db")
    stream = streamed(await asked(EventsApi(store), follow=True))
    assert await following(stream) == []
    await store.add_events([Event(1.0, "a", "failed", "the disk is gone")])
    assert await following(stream) == ["the disk is gone"]
    await stream.aclose()
    (folder / "gone.db").rename(folder / "state.db")
    await store.close()
