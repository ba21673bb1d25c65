"""/v1/realtime: a WebSocket to the engine of its model, which holds a lease for as long as it is open. Messages go both ways as they are.

The model is named by `?model=`, or by the first event, a `session.update`. In the second case the client is greeted here in the engine's
stead, because clients wait for that before they say anything; the engine's own greeting is dropped then. Who takes slowly holds the other
side back: a message is taken when the one before it was passed on.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from time import monotonic
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from orchestrator.api import asking, error_body, usage
from orchestrator.api.fate import Fate, Fates
from orchestrator.api.ids import Ids, ids
from orchestrator.api.talk import MESSAGE_BYTES, POLICY, Heard, Left, Talk
from orchestrator.control.counts import UPGRADED
from orchestrator.control.keys import Keys, Usage
from orchestrator.control.traffic import Ask, Asker, Traffic
from orchestrator.errors import EngineDied, OrchestratorError, RouteNotFound

log = logging.getLogger("orchestrator.realtime")

SILENCE_S = 30.0  # until the first message: who says nothing holds a place of an engine's for nothing
IDLE_S = 600.0  # in which neither side says anything: its lease keeps the model in GPU memory. Pings do not count, they answer themselves
OPEN_S, CLOSE_S = 10.0, 2.0  # for an engine's part in the handshakes
KEY = "openai-insecure-api-key."  # how browsers, which cannot set a header, send one: as a subprotocol
ASK = Ask(asking.UNBOUNDED_TOKENS, first=0, likely=asking.LIKELY_TOKENS)


class Realtime:
    """`socket_of`: launch id -> path of the engine's socket."""

    def __init__(
        self, traffic: Traffic, resolve: Callable[[str], str], socket_of: Callable[[str], str], keys: Keys, fates: Fates | None = None
    ) -> None:
        self._traffic, self._resolve, self._socket_of, self._keys = traffic, resolve, socket_of, keys
        self._fates = fates or Fates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        headers = _headers(scope)
        made = ids(headers.get(b"x-request-id"), headers.get(b"traceparent"))
        talk = Talk(receive, send, made, next((one for one in scope["subprotocols"] if not one.startswith(KEY)), None))
        fate = self._fates.begin("WS /v1/realtime", made)
        try:
            await self._talk(scope, headers, talk, fate)
        except OrchestratorError as error:
            fate.fail(error)
            await talk.refuse(error)
        except (Left, OSError):
            pass
        except Exception:
            log.exception("a realtime connection could not be served")
            fate.fail(error_body.BUG)
            await talk.refuse(error_body.BUG)
        finally:
            self._fates.end(fate)

    async def _talk(self, scope: Scope, headers: Mapping[bytes, bytes], talk: Talk, fate: Fate) -> None:
        caller = asking.caller_of(self._keys, scope, headers)
        fate.who = caller.client
        asker = asking.asker_of(headers, caller)
        name = parse_qs(scope["query_string"].decode("latin-1")).get("model", [""])[-1]
        heard, greeted = Heard(), not name
        if greeted:
            await talk.greet()
            name, first = await talk.first_model(SILENCE_S)
            await heard.put(first)
        fate.model = model = caller.resolve(self._resolve, name)
        caller.enter(model)
        try:
            await self._while_it_stays(talk, heard, greeted, asker, _passed_on(headers, fate.ids), fate)
        finally:
            caller.leave(model, fate.usage)

    async def _while_it_stays(self, talk: Talk, heard: Heard, greeted: bool, asker: Asker, headers: Mapping[str, str], fate: Fate) -> None:
        """The client is heard all the time, so it is known at once when it leaves."""
        hearing = asyncio.create_task(talk.hear(heard))
        serving = asyncio.create_task(self._serve(talk, heard, greeted, asker, headers, fate))
        try:
            ended: set[asyncio.Task[None]] = set()
            while not ended and (left_s := IDLE_S - talk.silent_s) > 0:
                ended, _ = await asyncio.wait((hearing, serving), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not ended:
                with contextlib.suppress(TimeoutError):  # who does not read either
                    await asyncio.wait_for(talk.close(POLICY, f"nothing was said for {IDLE_S:.0f} s"), CLOSE_S)
        finally:
            for task in (hearing, serving):
                task.cancel()
            await asyncio.wait((hearing, serving))
        if not serving.cancelled():
            serving.result()

    async def _serve(self, talk: Talk, heard: Heard, greeted: bool, asker: Asker, headers: Mapping[str, str], fate: Fate) -> None:
        model = fate.model
        async with self._traffic.lease(model, ASK, asker) as launch_id:
            fate.granted_at = monotonic()
            engine = await self._connect(model, launch_id, headers)
            talk.begin()
            try:
                if greeted:
                    await engine.recv()
                else:
                    await talk.accept()
                fate.status = UPGRADED
                sending = asyncio.create_task(_send_all(talk, heard, engine, None if greeted else SILENCE_S))
                try:
                    while True:
                        message = await engine.recv()
                        fate.usage = _used(fate.usage, message)
                        await talk.pass_on(message)
                finally:
                    sending.cancel()
                    await asyncio.wait((sending,))
            except ConnectionClosed as closed:
                if closed.rcvd is None:  # it did not say so
                    raise EngineDied(f"The engine of {model!r} broke off the connection.", retry_after_s=5) from None
                await talk.close(closed.rcvd.code, closed.rcvd.reason)
            finally:
                with contextlib.suppress(OSError, WebSocketException):
                    await engine.close(talk.code, talk.reason)

    async def _connect(self, model: str, launch_id: str, headers: Mapping[str, str]) -> ClientConnection:
        try:
            return await unix_connect(
                self._socket_of(launch_id),
                "ws://engine/v1/realtime",
                additional_headers=headers,
                compression=None,
                user_agent_header=None,
                max_size=MESSAGE_BYTES,
                open_timeout=OPEN_S,
                close_timeout=CLOSE_S,
            )
        except (OSError, WebSocketException) as error:
            if isinstance(error, InvalidStatus) and error.response.status_code in (403, 404):  # of a model with other tasks
                raise RouteNotFound(f"The model {model!r} hears nothing in real time.", param="model") from error
            raise EngineDied(f"The engine of {model!r} took no realtime connection: {error}.", retry_after_s=5) from error


async def _send_all(talk: Talk, heard: Heard, engine: ClientConnection, silence_s: float | None) -> None:
    """What the client says, to its engine. Ends with the connection."""
    try:
        async with asyncio.timeout(silence_s):
            message = await heard.get()
        while True:
            await engine.send(message)
            message = await heard.get()
    except TimeoutError:
        await talk.close(POLICY, f"nothing was said within {silence_s:.0f} s")
    except ConnectionClosed:
        pass  # who receives from it learns why


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """With the key where a browser put it."""
    headers = dict(scope["headers"])
    key = next((one for one in scope["subprotocols"] if one.startswith(KEY)), None)
    if key is not None:
        headers.setdefault(b"authorization", b"Bearer " + key.removeprefix(KEY).encode("latin-1"))
    return headers


def _passed_on(headers: Mapping[bytes, bytes], made: Ids) -> dict[str, str]:
    found = {"x-request-id": made.request_id.decode(), "traceparent": made.traceparent.decode()}
    if made.traced and b"tracestate" in headers:
        found["tracestate"] = headers[b"tracestate"].decode("latin-1")
    return found


def _used(before: Usage | None, message: str | bytes) -> Usage | None:
    """With what the engine says, if it does, that an answer of its took."""
    if isinstance(message, str) and '"usage"' in message:
        one = usage.Meter(False)
        one.part(message.encode())
        if (used := one.usage()) is not None:
            before = before or Usage(0, 0)
            return Usage(before.prompt_tokens + used.prompt_tokens, before.completion_tokens + used.completion_tokens)
    return before
