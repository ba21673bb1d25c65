"""Request bodies in memory: how large one may be, and how much all that are held at once.

A body is held until its request is over: in the queue, on its way to the engine, and while the answer comes. Bytes count as they come,
for a client that declares many and sends few holds none. Small bodies do not count: connections bound them, and a flood of large ones
keeps nobody's chat out.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from starlette.types import Message, Receive

from orchestrator.errors import BodyTooLarge, ModelUnavailable
from orchestrator.policy.units import KIB, show_bytes

SMALL_BYTES = 64 * KIB  # as much as a connection reads before anybody asks for it


class Bodies:
    """`most_bytes`: of one; `all_bytes`: of all large ones, where there are several."""

    def __init__(self, most_bytes: int, all_bytes: int) -> None:
        self.most_bytes, self.all_bytes = most_bytes, all_bytes
        self.small_bytes = min(most_bytes, SMALL_BYTES)
        self.held_bytes = 0

    def hold(self, receive: Receive) -> "Hold":
        return Hold(self, receive)


class Hold:
    """The body of one request, for as long as the `with` lasts."""

    def __init__(self, bodies: Bodies, receive: Receive) -> None:
        self._bodies, self._receive, self._counted = bodies, receive, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bodies.held_bytes -= self._counted

    async def read(self, headers: Mapping[bytes, bytes]) -> bytes | None:
        """The whole body, or None if the client left. Raises BodyTooLarge or ModelUnavailable as soon as it is known to be too much."""
        declared = headers.get(b"content-length", b"")
        if declared.isdigit():
            self._check(int(declared))
        whole: bytearray | None = None  # grows in place: parts that are joined at the end are there twice
        while True:
            message: Message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            chunk: bytes = message.get("body", b"")
            self._count((len(whole) if whole else 0) + len(chunk))
            more = message.get("more_body", False)
            if whole is None and not more:
                return chunk
            if whole is None:
                whole = bytearray()
            whole += chunk
            if not more:
                return whole  # type: ignore[return-value]  # nobody who reads it sees a difference

    def _check(self, size: int) -> None:
        there = self._bodies
        if size > there.most_bytes:
            raise BodyTooLarge(f"The request body is larger than {there.most_bytes} bytes (requests.max_body).")
        others = there.held_bytes - self._counted
        if size > there.small_bytes and others and others + size > there.all_bytes:
            told = f"Other requests hold {show_bytes(others)} of large bodies, and all together may hold {show_bytes(there.all_bytes)}"
            raise ModelUnavailable(f"{told} (requests.max_bodies): try again later.", code="busy", retry_after_s=2.0)

    def _count(self, size: int) -> None:
        self._check(size)
        if size > self._bodies.small_bytes:
            self._bodies.held_bytes += size - self._counted
            self._counted = size
