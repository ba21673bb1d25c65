"""Who calls: what a key allows, and what it has used. Nobody is asked for a key where none was ever made.

All of it is in memory, and on the way of each request: control/ledger.py makes it durable. Keys are found by their SHA-256. How long that
takes may tell something of the digest of what was sent, and nothing of a key: of 256 random bits no digest can be aimed at.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, NamedTuple

from orchestrator.control import allowance
from orchestrator.errors import Forbidden, ModelNotFound, QuotaSpent, RateLimited, Unauthorized
from orchestrator.policy.key import StoredKey

BUSY_S = 1.0  # Retry-After where an answer must end first: nobody knows when
Required = Literal["auto", "always", "never"]


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True, eq=False)
class Caller:
    """Who is behind a request. `client`: whose turn it uses where requests wait, of which it has `weight` where others have one.
    `priority`: as long as it asks for none. `metered`: its tokens are counted."""

    client: str
    priority: int = 0
    metered: bool = False
    weight: float = 1.0

    def urgency(self, asked: int | None) -> int:
        """The priority of a request that asks for one, or for none."""
        return self.priority if asked is None else asked

    def allows(self, model: str) -> bool:
        return True

    def resolve(self, resolve: Callable[[str], str], name: str) -> str:
        """As `resolve`, but who may not use all models is not told which there are. Raises ModelNotFound, Forbidden."""
        return resolve(name)

    def enter(self, model: str) -> None:
        """Before the request may wait. Raises Forbidden, RateLimited, and then nothing was counted."""

    def leave(self, model: str, usage: Usage | None) -> None:
        """However it ended; once for each enter()."""


class Account(Caller):
    """A key's, shared by all its requests."""

    def __init__(self, keys: "Keys", key: StoredKey, month_tokens: int) -> None:
        spec = key.spec
        super().__init__(spec.name, spec.priority, True, spec.weight)
        self.key, self._keys = key, keys
        self._models = None if spec.models is None else frozenset(spec.models)
        self.running = 0
        self.last_used_at = key.last_used_at
        self._requests_full_at = self._tokens_full_at = allowance.NEVER_USED
        self._month_tokens = month_tokens
        self._month_ends = allowance.month_ends(keys.wall())

    def urgency(self, asked: int | None) -> int:
        return self.priority if asked is None else min(asked, self.priority)

    def allows(self, model: str) -> bool:
        return self._models is None or model in self._models

    def resolve(self, resolve: Callable[[str], str], name: str) -> str:
        if self._models is None:
            return resolve(name)
        with contextlib.suppress(ModelNotFound):
            if (model := resolve(name)) in self._models:
                return model
        raise self._not_allowed(name)

    def enter(self, model: str) -> None:
        if not self.allows(model):
            raise self._not_allowed(model)
        spec, at = self.key.spec, self._keys.wall()
        if spec.monthly_tokens is not None:
            self._check_quota(spec.monthly_tokens, at)
        if spec.concurrency is not None and self.running >= spec.concurrency:
            raise RateLimited(f"The key {self.client!r} has {self.running} requests already (concurrency).", retry_after_s=BUSY_S)
        if spec.rpm is not None or spec.tpm is not None:
            now = self._keys.clock()
            if spec.tpm is not None and (wait_s := allowance.wait_s(self._tokens_full_at, now, spec.tpm)):
                raise _too_fast(self.client, spec.tpm, "tokens", "tpm", wait_s)
            if spec.rpm is not None:
                if wait_s := allowance.wait_s(self._requests_full_at, now, spec.rpm):
                    raise _too_fast(self.client, spec.rpm, "requests", "rpm", wait_s)
                self._requests_full_at = allowance.taken(self._requests_full_at, now, spec.rpm, 1)
        self.running += 1
        self.last_used_at = at

    def leave(self, model: str, usage: Usage | None) -> None:
        self.running -= 1
        at, tpm = self._keys.wall(), self.key.spec.tpm
        self._keys.count(self.client, model, allowance.day(at), usage)
        if usage is not None:
            tokens = usage.prompt_tokens + usage.completion_tokens
            if tpm is not None:
                self._tokens_full_at = allowance.taken(self._tokens_full_at, self._keys.clock(), tpm, tokens)
            self._in_month(at)
            self._month_tokens += tokens

    def _check_quota(self, most: int, at: float) -> None:
        self._in_month(at)
        if self._month_tokens >= most:
            raise QuotaSpent(
                f"The key {self.client!r} has used {self._month_tokens} of the {most} tokens that it has in a month (monthly_tokens).",
                retry_after_s=self._month_ends - at,
            )

    def _in_month(self, at: float) -> None:
        if at >= self._month_ends:
            self._month_tokens, self._month_ends = 0, allowance.month_ends(at)

    def _not_allowed(self, model: str) -> Forbidden:
        """The same for one that does not exist."""
        names = ", ".join(sorted(self._models or ()))
        return Forbidden(
            f"The key {self.client!r} may not use the model {model[:128]!r}. It may use: {names}", param="model", code="model_not_allowed"
        )


def is_here(address: str) -> bool:
    """Of this machine: what all its processes have in common. "" is a unix socket's."""
    return not address or address == "::1" or address.startswith("127.")


class Keys:
    """`clock`: of what is counted a minute; `wall`: seconds since the epoch, of expiry, days and months.

    `required`: auto, as soon as a first key was made, and for ever from then on; always, also before; never, those who have none are
    served, too (a gateway before us knows them).
    """

    def __init__(
        self, required: Required = "auto", clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self.required, self.clock, self.wall = required, clock, wall
        self._accounts: dict[bytes, Account] = {}  # by digest
        self._unwritten: dict[tuple[str, str, int], list[int]] = {}  # key, model, day -> requests, prompt and completion tokens
        self.needed = required == "always"

    def caller(self, headers: Mapping[bytes, bytes], address: str) -> Caller:
        """Raises Unauthorized, with the same words whatever is wrong."""
        account = self._account(headers) if self._accounts else None
        if account is not None and ((expires := account.key.spec.expires) is None or self.wall() < expires):
            return account
        if self.needed:
            raise Unauthorized(
                "This needs a valid API key, as `Authorization: Bearer <key>` or `x-api-key: <key>`: ask who runs this service."
            )
        credentials = headers.get(b"authorization")
        if credentials and is_here(address):
            return Caller(f"key {hash(credentials):x}")  # salted anew in each run: of the secret itself nothing is kept
        return Caller(address)

    def _account(self, headers: Mapping[bytes, bytes]) -> Account | None:
        """OpenAI's clients write Authorization, Anthropic's x-api-key."""
        given = headers.get(b"authorization", b"")
        if given[:7].lower() == b"bearer " and (account := self._accounts.get(sha256(given[7:].strip()).digest())) is not None:
            return account
        key = headers.get(b"x-api-key")
        return None if key is None else self._accounts.get(sha256(key.strip()).digest())

    # ---- for the ledger -----------------------------------------------------------------------------------------------

    def ask_for_keys(self) -> None:
        """There is a key now, or was once: whoever has none is refused from now on."""
        self.needed = self.required != "never"

    def admit(self, key: StoredKey, month_tokens: int) -> None:
        self._accounts[key.digest] = Account(self, key, month_tokens)

    def turn_away(self, digest: bytes) -> None:
        """From the next request on. Those that run end, and are counted."""
        self._accounts.pop(digest, None)

    def account(self, digest: bytes) -> Account | None:
        return self._accounts.get(digest)

    def count(self, key: str, model: str, day: int, usage: Usage | None, requests: int = 1) -> None:
        row = self._unwritten.get((key, model, day))
        if row is None:
            row = self._unwritten[key, model, day] = [0, 0, 0]
        row[0] += requests
        if usage is not None:
            row[1] += usage.prompt_tokens
            row[2] += usage.completion_tokens

    def unwritten(self) -> Mapping[tuple[str, str, int], list[int]]:
        return self._unwritten

    def take_unwritten(self) -> Mapping[tuple[str, str, int], list[int]]:
        taken, self._unwritten = self._unwritten, {}
        return taken


def _too_fast(name: str, most: int, what: str, field: str, wait_s: float) -> RateLimited:
    error = RateLimited(f"The key {name!r} has had its {most} {what} a minute ({field}).", retry_after_s=wait_s)
    error.type = what  # as OpenAI tells the two apart
    return error
