"""The operators' routes for keys: make, list, revoke, and what they have used. A key is in one answer, that of the call that makes it.

A key names models that there are; names and aliases mean the model, also when an alias is given to another one later.
"""

import time
from collections.abc import Awaitable, Callable
from datetime import date

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import ValidationError

from orchestrator.api.projections import Json
from orchestrator.control import allowance
from orchestrator.control.ledger import Entry, Ledger
from orchestrator.errors import BadRequest, ModelNotFound, Problem, SpecError
from orchestrator.policy.key import KeySpec, Used

NOTHING = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}


class KeysApi:
    """Under the operators' API. `resolve`: name or alias -> model, raising ModelNotFound. `made`: awaited when there is a new key."""

    def __init__(self, ledger: Ledger, resolve: Callable[[str], str], made: Callable[[], Awaitable[None]]) -> None:
        self._ledger, self._resolve, self._made = ledger, resolve, made

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/api/v1/keys")
        router.add_api_route("", self.all, methods=["GET"])
        router.add_api_route("", self.create, methods=["POST"], status_code=201)
        router.add_api_route("/usage", self.usage, methods=["GET"])
        router.add_api_route("/{name}", self.revoke, methods=["DELETE"])
        return router

    async def all(self) -> Json:
        return {"keys": await self._with_usage(self._ledger.entries())}

    async def create(self, request: Request) -> Json:
        spec = self._spec(await request.body())
        entry, secret = await self._ledger.create(spec)
        await self._made()
        return {**(await self._with_usage([entry]))[0], "key": secret}

    async def revoke(self, name: str) -> Json:
        return (await self._with_usage([await self._ledger.revoke(name)]))[0]

    async def usage(self, name: str | None = None, since: str | None = Query(None)) -> Json:
        try:
            first = 0 if since is None else (date.fromisoformat(since) - allowance.EPOCH).days
        except ValueError:
            raise BadRequest(f"since: {since!r} is not a date: write it like 2027-01-31.", param="since") from None
        if name is not None:
            self._ledger.get(name)
        return {"since": since, "usage": [row._asdict() for row in await self._ledger.used(name, first)]}

    def _spec(self, body: bytes) -> KeySpec:
        """Raises BadRequest, SpecError with every problem."""
        try:
            given = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"The request body is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise BadRequest("A key is a JSON object with at least `name`.")
        try:
            spec = KeySpec.model_validate(given, context={"now": time.time()})
        except ValidationError as error:
            raise SpecError(_problems(error)) from None
        models, problems = [], []
        for name in spec.models or ():
            try:
                models.append(self._resolve(name))
            except ModelNotFound as error:
                problems.append(Problem("models", error.message))
        if problems:
            raise SpecError(problems)
        return spec.model_copy(update={"models": tuple(dict.fromkeys(models))}) if spec.models else spec

    async def _with_usage(self, entries: list[Entry]) -> list[Json]:
        now = time.time()
        name = entries[0].key.spec.name if len(entries) == 1 else None
        today = _by_key(await self._ledger.used(name, allowance.day(now)))
        month = _by_key(await self._ledger.used(name, allowance.month_begins(now)))
        return [
            {**_shown(entry), "today": today.get(entry.key.spec.name, NOTHING), "month": month.get(entry.key.spec.name, NOTHING)}
            for entry in entries
        ]


def _shown(entry: Entry) -> Json:
    key = entry.key
    return {
        **key.spec.model_dump(mode="json", exclude={"expires"}),
        "prefix": key.shown,
        "state": entry.state,
        "running": entry.running,
        "created_at": key.created_at,
        "last_used_at": entry.last_used_at,
        "expires_at": key.spec.expires,
        "revoked_at": key.revoked_at,
    }


def _by_key(rows: list[Used]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for row in rows:
        sums = found.setdefault(row.key, dict(NOTHING))
        for field in sums:
            sums[field] += getattr(row, field)
    return found


def _problems(error: ValidationError) -> list[Problem]:
    """Field, value and mend of each."""
    problems = []
    for detail in error.errors():
        field, message = str(detail["loc"][0]) if detail["loc"] else "key", detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = f"unknown field; a key has: {', '.join(KeySpec.model_fields)}"
        elif detail["type"] == "missing":
            message = "is missing: give the key a name"
        elif detail["type"] != "value_error":
            message = f"{detail['input']!r}: {message[0].lower()}{message[1:]}"
        problems.append(Problem(field, message))
    return problems
