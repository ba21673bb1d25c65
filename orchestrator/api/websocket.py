"""A WebSocket's connection: uvicorn's, less the ways in which a client can leave it hanging, or have it fail."""

from typing import Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from orchestrator.api.refusal import whole
from orchestrator.errors import BadRequest


class WebSocket(WebSocketsSansIOProtocol):
    """uvicorn's, which leaves a handshake that its parser refuses (one with a body) unanswered for ever, and fails, with a traceback in
    the log, at a frame that is none before it has accepted or while it closes, and at what is said to who was closed for such a frame."""

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception:
            self.transport.close()
        if (why := self.conn.handshake_exc) is not None and not self.transport.is_closing():
            error = BadRequest(f"This is no handshake of a WebSocket: {why.__cause__ or why}", code="bad_http")
            self.transport.write(whole(error, self.default_headers))
            self.transport.close()

    async def send(self, message: Any) -> None:
        if self.transport.is_closing():
            raise ClientDisconnected
        await super().send(message)
