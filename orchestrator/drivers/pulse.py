"""The pulse of an engine that serves: does it still get on? One that does not is failed, whatever its /health says, and so replaced.

Its work counts as getting on while EngineCore says that it has none or waits for KV memory (that is the limits' affair), and while tokens
are counted or KV pages are taken: a prompt of a million tokens makes no token for minutes and holds up a probe, but takes its pages piece
by piece. Where there is no such sign for `hang_s`, it is asked for one token of its own, and fails if even then nothing moves.
Who was held up himself (a daemon or a machine that stood still) judges nobody.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any

from orchestrator.drivers import vllm
from orchestrator.drivers.engine_run import Run

PROBE_S = 10.0
FIRST = 6  # times hang_s, before it has made a token for users: what its warming up left out is compiled then, in one long step
PROBED = 16  # tokens: more than its own probes at the start take
LOOKS = 4  # in hang_s, while it has work; one while it has none
LATE_S = 2.0  # of our own: a look takes milliseconds


async def watch(run: Run, hang_s: float) -> None:
    """Until it is over, or hangs: then its run has failed."""
    pulse = Pulse(run, hang_s / LOOKS)
    while run.alive and run.error is None:
        await pulse.pause(hang_s if pulse.idle else hang_s / LOOKS if pulse.answers else 0.0)
        if pulse.resting() or await pulse.beats():
            continue
        if pulse.still_s > hang_s * (1 if pulse.served else FIRST) and not await pulse.answers_probe():
            assert run.api is not None
            said = "EngineCore hangs, while /health is 200" if await run.api.healthy() else "its API server does not answer"
            run.hangs = True
            run.fail(f"{said}: nothing has moved for {pulse.still_s:.0f} s, and a probe of one token got none in {PROBE_S:.0f} s")


class Pulse:
    """`idle`: nothing runs or waits in it. `answers`: it answered the last look. `served`: it has made tokens for users."""

    def __init__(self, run: Run, answer_s: float) -> None:
        self._run, self._answer_s = run, answer_s
        self._tokens: float | None = None
        self._used_bytes = self._used_now()
        self._held_up = False
        self._moved_at = time.monotonic()
        self.idle, self.answers, self.served = True, True, False

    @property
    def still_s(self) -> float:
        return time.monotonic() - self._moved_at

    def resting(self) -> bool:
        """It sleeps, or is on its way there or back: these have times of their own."""
        if self._run.asleep or self._run.busy("sleep") or self._run.busy("wake"):
            self._moved_at, self.idle, self.answers = time.monotonic(), True, True
            return True
        return False

    async def beats(self) -> bool:
        """One look: whether it gets on."""
        moved = await self._moves() or self._held_up
        self._held_up = False
        if moved:
            self._moved_at = time.monotonic()
        return moved

    async def _moves(self) -> bool:
        run, used = self._run, self._used_now()
        assert run.api is not None
        took, self._used_bytes = used != self._used_bytes, used
        status = await self._within(self._answer_s, run.api.rpc("kv_status"))
        self.answers = status is not None
        if status is None:
            self.idle = False
            made = await self._makes_tokens()  # its API server still knows what was made since the last look
            return took or (made and self._tokens is not None)
        runs = status.get("requests_running", 0) > 0
        self.idle = not runs and not status.get("requests_waiting")
        if not runs and self.served:
            return True
        return await self._makes_tokens() or took or not runs

    async def _makes_tokens(self) -> bool:
        """True too where its tokens are not counted: EngineCore has answered, so it goes from step to step."""
        assert self._run.api is not None
        asked = await self._within(self._answer_s, _listed(self._run.api.tokens()))
        if asked is None:
            return False
        (tokens,), before = asked, self._tokens
        self._tokens = tokens
        self.served = self.served or tokens is None or tokens > PROBED
        return tokens is None or tokens != before

    async def answers_probe(self) -> bool:
        """Whether it gets on meanwhile, with this token or any other."""
        assert self._run.api is not None
        asked = asyncio.ensure_future(self._within(PROBE_S, _listed(self._run.api.probe(self._run.model))))
        until = time.monotonic() + PROBE_S
        try:
            while (left := until - time.monotonic()) > 0:
                if self._run.error is not None or await self.beats() or (asked.done() and asked.result() is not None):
                    self._moved_at = time.monotonic()
                    return True
                await self.pause(min(self._answer_s, left))
            return False
        finally:
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked

    async def pause(self, seconds: float) -> None:
        began = time.monotonic()
        await asyncio.sleep(seconds)
        self._see_whether_late(began, seconds)

    async def _within(self, seconds: float, asking: Coroutine[Any, Any, Any]) -> Any:
        """The answer; None where there is none in this time, or an error."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                return await asking
        except (TimeoutError, *vllm.NO_ANSWER):
            return None
        finally:
            self._see_whether_late(began, seconds)

    def _see_whether_late(self, began: float, seconds: float) -> None:
        self._held_up = self._held_up or time.monotonic() - began > seconds + LATE_S

    def _used_now(self) -> int | None:
        segment = self._run.segment_now()
        return segment.used_bytes if segment else None


async def _listed(asking: Coroutine[Any, Any, Any]) -> list[Any]:
    """An answer that may be None itself."""
    return [await asking]
