"""Forms with a file, as transcriptions and translations take them, read with Python's mail parser. A sound of n bytes has n / 32000 s."""

from __future__ import annotations

import email.parser
import email.policy
import math
from dataclasses import dataclass

from starlette.requests import Request

from .answers import BadRequest, Json

BYTES_PER_S = 32_000  # 16 bits, 16 kHz, mono


@dataclass
class Upload:
    fields: dict[str, str]
    sound: bytes

    @property
    def seconds(self) -> int:
        return max(1, math.ceil(len(self.sound) / BYTES_PER_S))

    @property
    def streams(self) -> bool:
        return self.fields.get("stream", "").lower() == "true"


async def read(request: Request) -> Upload:
    head = b"Content-Type: " + request.headers.get("content-type", "").encode("latin-1") + b"\r\n\r\n"
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + await request.body())
    fields: dict[str, str] = {}
    sound: bytes | None = None
    for part in message.iter_parts() if message.is_multipart() else ():
        name = str(part.get_param("name", header="content-disposition"))
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        if name == "file":
            sound = content
        else:
            fields[name] = content.decode()
    if sound is None:
        raise BadRequest("1 validation error: {'type': 'missing', 'loc': ('body', 'file')}")
    return Upload(fields, sound)


def whole(text: str, upload: Upload) -> Json:
    return {"text": text, "usage": {"type": "duration", "seconds": upload.seconds}}
