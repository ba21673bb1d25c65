"""Who calls: what a key allows, and what it has used. Nobody is asked for a key where none is configured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Caller:
    """One request's. `client`: whose turn it uses where requests wait. `metered`: its tokens are counted."""

    client: str
    priority: int = 0
    metered: bool = False

    def enter(self, model: str) -> None:
        """Before the request may wait. Raises Forbidden, RateLimited."""

    def leave(self, model: str, usage: Usage | None) -> None:
        """However it ended; once for each enter()."""


class Keys:
    def caller(self, headers: Mapping[bytes, bytes], address: str) -> Caller:
        """Raises Unauthorized."""
        credentials = headers.get(b"authorization")
        if credentials and (not address or address == "::1" or address.startswith("127.")):
            return Caller(f"key {hash(credentials):x}")  # salted anew in each run: of the secret itself nothing is kept
        return Caller(address)
