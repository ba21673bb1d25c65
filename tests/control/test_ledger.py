"""Keys kept in a real state file: durable before they are shown, revoked for good, and of what was used nothing twice and nothing lost."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.control import ledger as ledger_module
from orchestrator.control.allowance import DAY_S, day
from orchestrator.control.keys import Account, Keys, Usage
from orchestrator.control.ledger import PREFIX, SHOWN, Ledger
from orchestrator.drivers.store import SqliteStore
from orchestrator.errors import Conflict, KeyNotFound, QuotaSpent, StoreError, Unauthorized
from orchestrator.policy.key import KeySpec, Used
from tests.support.eventually import eventually

pytestmark = pytest.mark.asyncio
TODAY = 1_800_000_000.0  # 2027-01-15 08:00 UTC


@dataclass
class Book:
    keys: Keys
    store: SqliteStore
    ledger: Ledger
    at: float = TODAY

    async def create(self, name: str, **fields: object) -> str:
        return (await self.ledger.create(KeySpec.model_validate({"name": name, **fields})))[1]

    def caller(self, secret: str) -> Account:
        found = self.keys.caller({b"x-api-key": secret.encode()}, "")
        assert isinstance(found, Account)
        return found

    def use(self, secret: str, model: str = "m", prompt: int = 10, completion: int = 1) -> None:
        account = self.caller(secret)
        account.enter(model)
        account.leave(model, Usage(prompt, completion))

    def states(self) -> dict[str, str]:
        return {entry.key.spec.name: entry.state for entry in self.ledger.entries()}


@contextlib.asynccontextmanager
async def book(folder: Path, at: float = TODAY) -> AsyncIterator[Book]:
    """Left without the last write: as a crash leaves it."""
    store = SqliteStore(folder / "state.db")
    await store.open()
    try:
        keys = Keys(wall=lambda: made.at)
        made = Book(keys, store, Ledger(keys, store), at)
        await made.ledger.load()
        yield made
    finally:
        await store.close()


async def test_a_key_has_256_bits_and_survives_a_restart(tmp_path: Path) -> None:
    async with book(tmp_path) as made:
        entry, secret = await made.ledger.create(KeySpec(name="ci", rpm=5))
        other = await made.create("other")
    assert secret.startswith(PREFIX)
    assert len(secret) - len(PREFIX) == 43  # 32 bytes in base64
    assert entry.key.shown == secret[:SHOWN]
    assert other != secret
    async with book(tmp_path) as again:
        assert again.caller(secret).client == "ci"
        assert again.caller(secret).key == entry.key


async def test_a_revoked_key_is_refused_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async with book(tmp_path) as made:
        secret = await made.create("ci")
        made.caller(secret)
        assert (await made.ledger.revoke("ci")).state == "revoked"
        first = (await made.ledger.revoke("ci")).key.revoked_at
        made.at += 5
        assert (await made.ledger.revoke("ci")).key.revoked_at == first  # again is harmless
        with pytest.raises(Unauthorized):
            made.caller(secret)
    async with book(tmp_path) as again:
        assert again.states() == {"ci": "revoked"}
        assert again.keys.needed  # a store that ever had a key is never open again
        with pytest.raises(Unauthorized):
            again.caller(secret)
        with pytest.raises(Unauthorized):
            again.keys.caller({}, "127.0.0.1")


async def test_nobody_needs_a_key_where_none_was_ever_made(tmp_path: Path) -> None:
    async with book(tmp_path) as made:
        assert made.keys.caller({}, "10.0.0.1").client == "10.0.0.1"
        await made.create("ci")
        with pytest.raises(Unauthorized):
            made.keys.caller({}, "10.0.0.1")


async def test_a_name_is_taken_until_it_is_revoked_and_its_usage_goes_on(tmp_path: Path) -> None:
    async with book(tmp_path) as made:
        secret = await made.create("ci", monthly_tokens=20)
        with pytest.raises(Conflict, match=r"'ci' is that of a key already: .* `orchestratorctl keys revoke ci`"):
            await made.create("ci")
        made.use(secret, prompt=15)
        await made.ledger.revoke("ci")
        anew = await made.create("ci", monthly_tokens=30)
        assert made.states() == {"ci": "active"}
        with pytest.raises(Unauthorized):
            made.caller(secret)
        made.use(anew, prompt=14)
        with pytest.raises(QuotaSpent):
            made.caller(anew).enter("m")
        assert await made.ledger.used() == [Used("ci", "m", 2, 29, 2)]


async def test_names_that_are_not_there(tmp_path: Path) -> None:
    async with book(tmp_path) as made:
        with pytest.raises(KeyNotFound, match="none yet; `orchestratorctl keys create NAME` makes one"):
            await made.ledger.revoke("ci")
        await made.create("alice")
        with pytest.raises(KeyNotFound, match=r"Did you mean 'alice'\? Known keys: alice"):
            await made.ledger.revoke("alise")


async def test_expired_keys_are_listed_as_such(tmp_path: Path) -> None:
    async with book(tmp_path) as made:
        await made.create("brief", expires=TODAY + 60)
        assert made.states() == {"brief": "active"}
        made.at += 60
        assert made.states() == {"brief": "expired"}


async def test_what_was_used_is_read_to_the_last_answer_and_written_in_batches(tmp_path: Path) -> None:
    async with book(tmp_path) as made:
        a, b = await made.create("a"), await made.create("b")
        for _ in range(3):
            made.use(a, "m")
        made.use(b, "n", 100, 0)
        expected = [Used("a", "m", 3, 30, 3), Used("b", "n", 1, 100, 0)]
        assert await made.ledger.used() == expected
        assert await made.ledger.used("b") == expected[1:]
        made.at += DAY_S
        made.use(a, "m", 5, 5)
        assert await made.ledger.used(since=day(made.at)) == [Used("a", "m", 1, 5, 5)]
        last = made.at
    async with book(tmp_path, last) as again:
        assert await again.ledger.used() == [Used("a", "m", 4, 35, 8), Used("b", "n", 1, 100, 0)]
        assert {entry.key.spec.name: entry.last_used_at for entry in again.ledger.entries()} == {"a": last, "b": TODAY}


async def test_it_writes_by_itself_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "WRITE_S", 0.01)
    async with book(tmp_path) as made:
        made.use(await made.create("a"))
        running = asyncio.create_task(made.ledger.run())
        await eventually(lambda: not made.keys.unwritten(), "it was written")
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert await made.store.usage() == [Used("a", "m", 1, 10, 1)]


async def test_a_disk_that_is_full_for_a_while_loses_and_doubles_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with book(tmp_path) as made:
        secret = await made.create("a")
        made.use(secret)
        await made.store._run(lambda db: db.execute("PRAGMA query_only = ON").close())
        for _ in range(3):
            assert await made.ledger.used() == [Used("a", "m", 1, 10, 1)]
        made.use(secret)
        assert await made.ledger.used() == [Used("a", "m", 2, 20, 2)]
        assert await made.ledger.used(since=day(made.at) + 1) == []
        assert await made.ledger.used("b") == []
        assert caplog.text.count("can not be written now") == 1
        with pytest.raises(StoreError):
            await made.create("b")
        with pytest.raises(StoreError):
            await made.ledger.revoke("a")
        assert made.states() == {"a": "active"}
        assert made.caller(secret).client == "a"
        await made.store._run(lambda db: db.execute("PRAGMA query_only = OFF").close())
        await made.ledger.close()
        assert await made.store.usage() == [Used("a", "m", 2, 20, 2)]


async def test_a_quota_counts_what_was_used_before_a_restart_and_only_in_this_month(tmp_path: Path) -> None:
    async with book(tmp_path) as made:
        secret = await made.create("a", monthly_tokens=11)
        made.use(secret)
        await made.ledger.close()
    async with book(tmp_path) as again:
        with pytest.raises(QuotaSpent):
            again.caller(secret).enter("m")
    async with book(tmp_path, TODAY + 20 * DAY_S) as next_month:
        next_month.use(secret)


async def test_many_at_once_make_one_key_of_a_name(tmp_path: Path) -> None:
    async with book(tmp_path) as made:
        done = await asyncio.gather(*(made.create("ci") for _ in range(5)), return_exceptions=True)
        assert [isinstance(one, Conflict) for one in done].count(True) == 4
        assert len(made.ledger.entries()) == 1
