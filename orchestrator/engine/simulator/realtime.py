"""/v1/realtime: events over a WebSocket, as vLLM transcribes in real time. A commit is answered with a word for each sound before it."""

from __future__ import annotations

import json
import uuid
from time import time

from starlette.websockets import WebSocket, WebSocketDisconnect

from .answers import Json, usage_of, words


class Realtime:
    """`names`: those that the engine serves its model under."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    async def serve(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(json.dumps({"type": "session.created", "id": f"sess-{uuid.uuid4().hex}", "created": int(time())}))
        sounds, valid = 0, False
        try:
            while True:
                event: Json = json.loads(await socket.receive_text())
                match event.get("type"):
                    case "session.update" if event.get("model") in self._names:
                        valid = True
                    case "session.update":
                        await _fail(socket, f"The model `{event.get('model')}` does not exist.", "model_not_found")
                    case "input_audio_buffer.append":
                        sounds += 1
                    case "input_audio_buffer.commit" if not valid:
                        await _fail(socket, "Model not validated.", "model_not_validated")
                    case "input_audio_buffer.commit":
                        for n in range(1, sounds + 1):
                            await socket.send_text(json.dumps({"type": "transcription.delta", "delta": words(self._names[0], n, n)}))
                        done = {"type": "transcription.done", "text": words(self._names[0], 1, sounds), "usage": usage_of(sounds, sounds)}
                        await socket.send_text(json.dumps(done))
                        sounds = 0
                    case other:
                        await _fail(socket, f"Unknown event type: {other}", "unknown_event")
        except json.JSONDecodeError:
            await socket.close(1003, "not JSON")
        except WebSocketDisconnect:
            pass


async def _fail(socket: WebSocket, message: str, code: str) -> None:
    await socket.send_text(json.dumps({"type": "error", "error": message, "code": code}))
