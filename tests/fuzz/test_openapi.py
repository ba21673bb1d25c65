"""GET /openapi.json: made of the table of routes, so that neither says what the other does not; and each 405 says what is allowed."""

from pathlib import Path

import pytest
import schemathesis

from orchestrator.api.openapi import FIELDS, HEADERS, document
from orchestrator.api.routes import TABLE, Model
from tests.api.house import house

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()
OWN = {("get", "/v1/models"), ("get", "/v1/models/{name}"), ("get", "/health")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_it_is_openapi_with_each_route_of_the_table() -> None:
    made = document(TABLE)
    schemathesis.openapi.from_dict(made).validate()
    written = {(method, path) for path, item in made["paths"].items() for method in item}
    assert written == OWN | {(route.method.lower(), route.path) for route in TABLE if route.model is not Model.TALK}
    assert all(route.path in made["info"]["description"] for route in TABLE if route.model is Model.TALK)
    assert set(FIELDS) <= {route.path for route in TABLE}


def test_a_model_is_required_where_the_body_names_it() -> None:
    for route in TABLE:
        if route.model not in (Model.BODY, Model.FORM):
            continue
        ((schema),) = (one["schema"] for one in document(TABLE)["paths"][route.path]["post"]["requestBody"]["content"].values())
        required = schema["required"] + [name for one in schema.get("anyOf", []) for name in one["required"]]
        assert "model" in required, route.path


def test_its_headers_are_those_of_the_docs() -> None:
    assert [name for name, _, _ in HEADERS.values() if f"| `{name}" not in PAGE] == []


@pytest.mark.asyncio
async def test_it_is_served_without_a_model(folder: Path) -> None:
    async with house(folder) as at:
        answer = await at.get("/openapi.json")
        assert (answer.status, answer.json) == (200, document(TABLE))
        assert (await at.post("/openapi.json", b"")).status == 405


@pytest.mark.asyncio
@pytest.mark.parametrize(("method", "path", "allowed"), [("GET", "/v1/completions", b"POST"), ("POST", "/v1/models", b"GET")])
async def test_a_405_says_what_is_allowed(folder: Path, method: str, path: str, allowed: bytes) -> None:
    async with house(folder) as at:
        assert (await at.post(path, b"", method=method)).header(b"allow") == allowed
