"""KeySpec: what a key of the users' endpoint allows. Immutable; every field is checked here and nowhere else.

The key itself is in none of these: who makes it shows it once, and what is kept is its SHA-256 and its first characters.
"""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from orchestrator.policy.units import parse_duration

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,63}")
LATEST = 253_402_300_799  # the end of the year 9999: calendars go no further
MOST = 10**12  # of anything that is counted; larger numbers are typing errors


def _expiry(value: object, info: ValidationInfo) -> object:
    """Seconds since the epoch, of `30d`, of a date (its first moment, UTC), or of those seconds. `now` of the context: from when."""
    now = float((info.context or {}).get("now", 0.0))
    if value is None:
        return None
    found = value if isinstance(value, (int, float)) and not isinstance(value, bool) else _moment(str(value).strip(), now)
    if not now < found <= LATEST:  # written so that nan is refused
        raise ValueError(f"{value!r} has passed, or never comes: write a time to come, like 30d or 2027-01-31, or leave it out")
    return found


def _moment(text: str, now: float) -> float:
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            day = date.fromisoformat(text)
            return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
        if re.search(r"[a-z]", text):
            return now + parse_duration(text)
    except ValueError:
        pass
    raise ValueError(f"{text!r} is neither a duration up to 366 days nor a date: write it like 30d, 12h or 2027-01-31")


Count = Annotated[int, Field(ge=1, le=MOST, strict=True)]


class KeySpec(BaseModel):
    """What a key allows. None: no bound of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Whose it is, for people; unique among the keys that are not revoked.")
    models: tuple[str, ...] | None = Field(default=None, description="The models that it may use. Default: all.")
    priority: int = Field(default=0, ge=-8, le=8, strict=True, description="The highest that its requests may have.")
    weight: float = Field(
        default=1.0, ge=0.01, le=100, allow_inf_nan=False, description="How many turns it has where others of its priority have one."
    )
    rpm: Count | None = Field(default=None, description="Requests a minute.")
    tpm: Count | None = Field(default=None, description="Tokens a minute, of prompts and answers.")
    concurrency: Count | None = Field(default=None, description="Requests at the same time, those that wait included.")
    monthly_tokens: Count | None = Field(default=None, description="Tokens in a calendar month, of prompts and answers.")
    expires: Annotated[float | None, BeforeValidator(_expiry)] = Field(
        default=None, description="From when it is no longer valid: seconds since the epoch; a duration or a date where it is made."
    )

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name: use 1 to 64 letters, digits and . _ : @ + -, starting with a letter or digit")
        return name

    @field_validator("models")
    @classmethod
    def _models(cls, models: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if models is not None and not models:
            raise ValueError("no model is in the list: name some, or leave it out for all")
        return None if models is None else tuple(dict.fromkeys(models))


@dataclass(frozen=True, slots=True)
class StoredKey:
    """`digest`: SHA-256 of the key. `shown`: its first characters. Times: seconds since the epoch."""

    spec: KeySpec
    digest: bytes
    shown: str
    created_at: float
    last_used_at: float | None = None
    revoked_at: float | None = None


class Used(NamedTuple):
    """What one key has used of one model. `requests`: those that were let in, however they ended."""

    key: str
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
