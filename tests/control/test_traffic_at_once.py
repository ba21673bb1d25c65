"""A place at once, without a wait (takes, take): exactly where a lease would not wait, and counted in the same way."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control import traffic as module
from orchestrator.control.traffic import Ask, Door, Traffic
from orchestrator.errors import ModelNotFound, ModelUnavailable
from tests.control.fakes import Clock
from tests.control.world import Request
from tests.support.eventually import turns

DOORS = st.builds(
    Door,
    launch_id=st.sampled_from(["one", "one", None]),
    error=st.sampled_from([None, None, None, ModelUnavailable("down", code="model_failed")]),
    max_concurrency=st.integers(0, 3),
    fitting_tokens=st.sampled_from([None, 100, 1000]),
)
ASKS = st.builds(Ask, most=st.just(1200), first=st.sampled_from([0, 500]), likely=st.just(800))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(door=DOORS, ask=ASKS, there=st.integers(0, 4), name=st.sampled_from(["a", "a", "b"]))
def test_a_place_is_given_at_once_just_where_a_lease_would_not_wait(door: Door, ask: Ask, there: int, name: str) -> None:
    async def both() -> None:
        traffic, other = Traffic(lambda: None, 60.0, Clock()), Traffic(lambda: None, 60.0, Clock())
        requests = []
        for one in (traffic, other):
            one.publish({"a": Door("one", max_concurrency=2)})
            requests += [Request(one, "a") for _ in range(there)]
            await turns()
            one.publish({"a": door})
        leased = Request(other, name, ask)
        await turns()
        at_once = leased.launch_id is not None
        assert traffic.takes(name, ask) is at_once
        if at_once:
            launch_id, _, give_back = traffic.take(name, ask)
            assert launch_id == "one"
            assert traffic.seen() == other.seen()
            give_back()
            await leased.finish()
            assert traffic.seen() == other.seen()
        for request in (*requests, leased):
            with contextlib.suppress(ModelUnavailable, ModelNotFound):
                await request.cancel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROOM_S", 3600.0)
        asyncio.run(both())
