"""Which paths lead where: the users' routes and no others. An engine's development routes are beyond reach from outside."""

import re
from pathlib import Path

import pytest

from orchestrator.api.routes import TABLE, Model
from tests.api.house import house

QWEN = {"name": "org/qwen", "aliases": ["q"], "source": "org/qwen"}
IDLE = {"name": "idle", "source": "org/idle", "preload": False}
BODY = b'{"model":"org/qwen","method":"kv_limit","args":["1","1"]}'

pytestmark = pytest.mark.asyncio


NOT_OURS = (
    "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache", "/metrics", "/version", "/load", "/invocations",
    "/v1/collective_rpc", "/v1/../collective_rpc", "//collective_rpc", "/v1/completions/../../collective_rpc",
    "/v1/%2e%2e/collective_rpc", "/%2e%2e/collective_rpc", "/v1/completions%2f..%2f..%2fcollective_rpc", "/v1/..%2fsleep",
    "/v1%2fcompletions", "/v1%2Fcompletions", "/v1/chat%2Fcompletions", "/v1/audio/speech", "/v1/load_lora_adapter", "/generative_scoring",
    "/inference/v1/generate", "/upstream/org/qwen/metrics", "/v1/responses/a/b", "/v1/responses//cancel", "/v1/responses/a%2fcancel",
    "/v1//completions", "/V1/completions", "/v1/completions/", "/v1/completions%3f", "/v1/completions;/sleep", "/v1/completions%00",
    "/v1/chat/completions/..", "/.", "/", "http://engine/collective_rpc",
)  # fmt: skip


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_no_other_path_reaches_an_engine(folder: Path, method: str) -> None:
    async with house(folder, QWEN) as at:
        for target in NOT_OURS:
            answer = await at.post(target, BODY, method=method)
            assert (answer.status, answer.error["code"]) in ((404, "route_not_found"), (405, "method_not_allowed")), target
            assert answer.status == 404 or (method == "GET" and target.lower().count("%2f") == 1)
            assert method in answer.error["message"]
        assert at.upstream.untouched()


async def test_each_route_of_the_table_reaches_the_engine_of_its_model(folder: Path) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nq\r\n--b--\r\n'
    async with house(folder, QWEN) as at, at.client() as client:
        for route in TABLE:
            if route.model not in (Model.BODY, Model.FORM):
                continue
            sent, kind = (form, "multipart/form-data; boundary=b") if route.model is Model.FORM else (BODY, "application/json")
            head = f"POST {route.path} HTTP/1.1\r\nHost: h\r\nContent-Type: {kind}\r\nContent-Length: {len(sent)}\r\n\r\n"
            await client.send(head.encode() + sent)
            exchange = await at.upstream.request()
            assert (exchange.target.decode(), exchange.body) == (route.path, sent)
            assert exchange.header(b"content-type") == [kind.encode()]
            await exchange.answer(200, b"{}")
            assert (await client.answer()).status == 200
        await at.until_counts("org/qwen", 0, 0)


async def test_the_table_in_the_docs_is_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs/api.md").read_text()
    written = re.findall(r"^\| `(GET|POST|WS) (\S+)` \| (.+?) \|", text.partition("| the daemon's own |")[0], re.MULTILINE)
    assert written == [(route.method, route.path, route.model.value) for route in TABLE]


async def test_a_whole_url_or_an_escaped_letter_names_the_same_route(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        for target in ("http://elsewhere/v1/completions", "/v1/%63ompletions"):
            await client.request(target, BODY)
            exchange = await at.upstream.request()
            assert exchange.target == b"/v1/completions"
            await exchange.answer(200, b"{}")
            assert (await client.answer()).status == 200


async def test_a_wrong_method_is_a_405(folder: Path) -> None:
    wrong = (
        ("GET", "/v1/chat/completions"), ("PUT", "/v1/completions"), ("DELETE", "/v1/models"), ("POST", "/v1/models"), ("POST", "/health"),
    )  # fmt: skip
    async with house(folder, QWEN) as at:
        for method, target in wrong:
            answer = await at.post(target, BODY, method=method)
            assert (answer.status, answer.error["code"]) == (405, "method_not_allowed"), target
            assert method in answer.error["message"]
        assert at.upstream.untouched()


async def test_models_are_listed_as_openai_does(folder: Path) -> None:
    async with house(folder, QWEN, IDLE) as at:
        answer = await at.get("/v1/models")
        assert (answer.status, answer.json["object"]) == (200, "list")
        assert [model["id"] for model in answer.json["data"]] == ["idle", "org/qwen"]
        for model in answer.json["data"]:
            assert (model["object"], model["created"], model["owned_by"]) == ("model", 1500000000, "orchestrator")
        assert [model["state"] for model in answer.json["data"]] == ["stopped", "ready"]


async def test_one_model_by_name_with_a_slash_or_by_alias(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        for target in ("/v1/models/org/qwen", "/v1/models/org%2Fqwen", "/v1/models/q"):
            answer = await at.get(target)
            assert (answer.status, answer.json["id"], answer.json["aliases"]) == (200, "org/qwen", ["q"])


async def test_one_model_that_is_not_there(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        answer = await at.get("/v1/models/org/qwem")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert "Did you mean 'org/qwen'?" in answer.error["message"]


async def test_health_is_the_daemons_own(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        assert (await at.get("/health")).json == {"status": "ok"}
        assert at.upstream.untouched()


async def test_the_admin_api_is_not_on_the_users_port(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        for method, target in (("GET", "/api/v1/status"), ("POST", "/api/v1/models"), ("DELETE", "/api/v1/models/org/qwen")):
            answer = await at.post(target, b"{}", "Authorization: Bearer x", method=method)
            assert (answer.status, answer.error["code"]) == (404, "route_not_found")


async def test_the_users_routes_are_not_on_the_admin_socket(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        for target in ("/../../v1/models", "/../v1/models"):
            assert (await at.operate("GET", target)).status == 404
        assert (await at.operate("POST", "/collective_rpc", BODY)).error["code"] == "route_not_found"


async def test_with_a_key_the_admin_api_is_on_the_users_port_for_its_bearer_alone(folder: Path) -> None:
    async with house(folder, QWEN, key="sesame-žluť") as at:
        for given in ([], *([f"Authorization: {wrong}"] for wrong in ("Bearer sesame", "Basic sesame-žluť", "sesame-žluť", "Bearer "))):
            for method, target in (("GET", "/api/v1/status"), ("DELETE", "/api/v1/models/org/qwen"), ("POST", "/api/v1/models/q/stop")):
                answer = await at.post(target, b"", *given, method=method)
                assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
                assert answer.header(b"www-authenticate") == b"Bearer"
        answer = await at.get("/api/v1/status", "Authorization: bearer sesame-žluť")
        assert (answer.status, answer.json["models"]) == (200, {"ready": 1})
        assert (await at.operate("GET", "/status")).status == 200  # the socket asks for none
