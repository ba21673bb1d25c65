"""The keys that were made and what they have used, kept: a key is durable before it is shown, a revocation before it is answered.

Usage is added up in memory and written every WRITE_S and at the end, so a crash loses seconds of it. What could not be written is
counted on, and written with the next. Names of keys that were revoked may be used anew; their usage goes on under them.
"""

import asyncio
import difflib
import logging
import secrets
from dataclasses import dataclass, replace
from hashlib import sha256

from orchestrator.control import allowance
from orchestrator.control.keys import Keys, Usage
from orchestrator.control.ports import KeyStore
from orchestrator.errors import Conflict, KeyNotFound, StoreError, listed
from orchestrator.policy.key import KeySpec, StoredKey, Used

log = logging.getLogger("orchestrator.keys")

WRITE_S = 3.0
PREFIX = "sk-orch-"
SECRET_BYTES = 32
SHOWN = len(PREFIX) + 4  # characters that lists show: enough to tell keys apart, and 232 bits stay unknown


@dataclass(frozen=True, slots=True)
class Entry:
    """A key as it is now. `state`: active, expired or revoked. `running`: its requests, those that wait included."""

    key: StoredKey
    state: str
    running: int
    last_used_at: float | None


class Ledger:
    def __init__(self, keys: Keys, store: KeyStore) -> None:
        self._keys, self._store = keys, store
        self._known: dict[str, StoredKey] = {}
        self._changing, self._writing = asyncio.Lock(), asyncio.Lock()
        self._failing = False

    async def load(self) -> None:
        known, any_ever = await self._store.keys()
        if any_ever:
            self._keys.ask_for_keys()
        tokens = await self._month_tokens(None)
        for key in known:
            self._known[key.spec.name] = key
            if key.revoked_at is None:
                self._keys.admit(key, tokens.get(key.spec.name, 0))

    def entries(self) -> list[Entry]:
        return [self._entry(key) for key in self._known.values()]

    async def create(self, spec: KeySpec) -> tuple[Entry, str]:
        """And the key itself, of which nothing else is kept. Raises Conflict for a name that is taken."""
        async with self._changing:
            before = self._known.get(spec.name)
            if before is not None and before.revoked_at is None:
                mend = f"choose another one, or `orchestratorctl keys revoke {spec.name}` first"
                raise Conflict(f"name: {spec.name!r} is that of a key already: {mend}.", param="name")
            secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
            key = StoredKey(spec, sha256(secret.encode()).digest(), secret[:SHOWN], self._keys.wall())
            await self._write_usage()
            tokens = await self._month_tokens(spec.name)
            await self._store.put_key(key)
            self._known.pop(spec.name, None)  # the newest comes last
            self._known[spec.name] = key
            self._keys.admit(key, tokens.get(spec.name, 0))
            self._keys.ask_for_keys()
            log.info("key %s: made (%s…)", spec.name, key.shown)
            return self._entry(key), secret

    async def revoke(self, name: str) -> Entry:
        """Again is harmless. Raises KeyNotFound."""
        async with self._changing:
            key = self.get(name)
            if key.revoked_at is None:
                account = self._keys.account(key.digest)
                key = replace(key, revoked_at=self._keys.wall(), last_used_at=account.last_used_at if account else key.last_used_at)
                await self._store.revoke_key(name, key.revoked_at or 0.0)
                self._known[name] = key
                self._keys.turn_away(key.digest)
                log.info("key %s: revoked (%s…)", name, key.shown)
            return self._entry(key)

    def get(self, name: str) -> StoredKey:
        key = self._known.get(name)
        if key is None:
            near = difflib.get_close_matches(name, self._known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            known = listed(self._known, none="none yet; `orchestratorctl keys create NAME` makes one")
            raise KeyNotFound(f"name: there is no key {name!r}.{hint} Known keys: {known}", param="name")
        return key

    async def used(self, name: str | None = None, since: int = 0) -> list[Used]:
        """Of one key or of all, from the day `since` on, with every answer that has ended."""
        await self._write_usage()
        totals = {row[:2]: row for row in await self._store.usage(name, allowance.name_of(since))}
        for (key, model, day), counted in self._keys.unwritten().items():
            if day >= since and name in (None, key):
                before = totals.get((key, model), Used(key, model, 0, 0, 0))
                totals[key, model] = Used(key, model, *(a + b for a, b in zip(before[2:], counted, strict=True)))
        return sorted(totals.values())

    async def run(self) -> None:
        """Write what was used, now and then, until cancelled."""
        while True:
            await asyncio.sleep(WRITE_S)
            await self._write_usage()

    async def close(self) -> None:
        await self._write_usage()

    async def _write_usage(self) -> None:
        async with self._writing:
            taken = self._keys.take_unwritten()
            if not taken:
                return
            accounts = [self._keys.account(key.digest) for key in self._known.values()]
            last = {account.client: account.last_used_at for account in accounts if account and account.last_used_at}
            used = {key for key, _, _ in taken}
            try:
                rows = [(Used(key, model, *counted), allowance.name_of(day)) for (key, model, day), counted in taken.items()]
                await self._store.add_usage(rows, {name: at for name, at in last.items() if name in used})
            except StoreError as error:
                for (key, model, day), (requests, prompt, completion) in taken.items():
                    self._keys.count(key, model, day, Usage(prompt, completion), requests)
                if not self._failing:
                    log.warning("the usage of keys can not be written now, and is kept in memory: %s", error)
                self._failing = True
            else:
                self._failing = False

    async def _month_tokens(self, name: str | None) -> dict[str, int]:
        tokens: dict[str, int] = {}
        for row in await self._store.usage(name, allowance.name_of(allowance.month_begins(self._keys.wall()))):
            tokens[row.key] = tokens.get(row.key, 0) + row.prompt_tokens + row.completion_tokens
        return tokens

    def _entry(self, key: StoredKey) -> Entry:
        account = self._keys.account(key.digest)
        state = "active"
        if key.revoked_at is not None:
            state = "revoked"
        elif key.spec.expires is not None and self._keys.wall() >= key.spec.expires:
            state = "expired"
        return Entry(key, state, account.running if account else 0, account.last_used_at if account else key.last_used_at)
