"""Sizes and durations as people write them. Binary units only: GPU memory is counted in GiB, and `GB` means two things.

Accepted: 123 (bytes, seconds), "512MiB", "2.5GiB", "3G" (as kvctl: binary), "90s", "10m", "1h30m", "2d".
"""

import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
MAX_BYTES = 1 << 50  # 1 PiB: beyond every GPU; larger numbers are typing errors

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT])(?:i?B)?|(\d+)B?")
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_UNIT = {"K": KIB, "M": MIB, "G": GIB, "T": TIB}


def parse_size(value: object) -> int:
    """Bytes. Raises ValueError with the mend."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a size: write it like 2GiB or 512MiB")
    if isinstance(value, str):
        text = value.strip()
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", text):
            raise ValueError(f"{value!r} is ambiguous (decimal or binary?): write {match[1]}{match[2]}iB")
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError(f"{value!r} is not a size: write digits and a unit without a space, like 2GiB or 512MiB")
        size = float(match[1]) * _UNIT[match[2]] // 1 if match[1] else int(match[3])  # 1.1GiB is no whole number of bytes
    else:
        size = value
    if not 0 <= size <= MAX_BYTES or size != int(size):  # written so that nan is refused
        raise ValueError(f"{value!r} is not a size between 0 and 1024TiB: write it like 2GiB or 512MiB")
    return int(size)


def parse_duration(value: object) -> float:
    """Seconds. Raises ValueError with the mend."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a duration: write it like 90s, 10m or 1h30m")
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"\d+(\.\d+)?", text):
            seconds = float(text)
        else:
            match = _DURATION.fullmatch(text)
            if match is None or not text:
                raise ValueError(f"{value!r} is not a duration: write it like 90s, 10m or 1h30m")
            days, hours, minutes, rest = (float(part or 0) for part in match.groups())
            seconds = days * 86400 + hours * 3600 + minutes * 60 + rest
    else:
        seconds = value
    if not 0 < seconds <= 366 * 86400:
        raise ValueError(f"{value!r} is not a duration between 0 and 366 days: write it like 90s, 10m or 1h30m")
    return float(seconds)


def show_bytes(size: float) -> str:
    """12.3GiB, 640MiB: for reasons that people read."""
    return f"{size / GIB:.1f}GiB" if abs(size) >= 10 * GIB else f"{size / MIB:.0f}MiB"


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?([KMGT](iB)?)?$"}]}),
]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+(\.\d+)?s?)?$"}]}
    ),
]
