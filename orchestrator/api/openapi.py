"""What the users' endpoint says of itself: an OpenAPI document, made of the table of routes.

Of a request it holds what this daemon acts on (`model`, `stream`, its headers) and the fields that tell one route from another; all else
is the engine's to judge and may be there. OpenAPI has no word for a WebSocket: `WS` routes are named in the description.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator import __version__
from orchestrator.api.routes import RESPONSES, Model, Route

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
TOKENS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}}
MESSAGES: Json = {
    "type": "array",
    "items": {"type": "object", "properties": {"role": TEXT, "content": {}}, "required": ["role"]},
}
ANY: Json = {}
ONE_OR_MORE: Json = {"anyOf": [TEXT, {"type": "array"}]}
SCORED: Json = {"text_1": ONE_OR_MORE, "text_2": ONE_OR_MORE, "queries": ONE_OR_MORE, "documents": ONE_OR_MORE}
RANKED: Json = {"query*": TEXT, "documents*": ONE_OR_MORE, "top_n": {"type": "integer", "minimum": 0}}
# The fields that make a request one of its route, as vLLM 0.24 names them; those with a * it cannot do without.
FIELDS: Mapping[str, Mapping[str, Json]] = {
    "/v1/chat/completions": {"messages*": MESSAGES},
    "/v1/chat/completions/batch": {"messages*": {"type": "array", "items": MESSAGES}},
    "/v1/chat/completions/render": {"messages*": MESSAGES},
    "/v1/completions": {"prompt": ONE_OR_MORE},
    "/v1/completions/render": {"prompt": ONE_OR_MORE},
    "/v1/responses": {"input*": ONE_OR_MORE, "previous_response_id": ANY, "background": ANY},
    "/v1/messages": {"messages*": MESSAGES, "max_tokens*": {"type": "integer"}, "system": ANY},
    "/v1/messages/count_tokens": {"messages*": MESSAGES, "system": ANY},
    "/v1/embeddings": {"input": ONE_OR_MORE},
    "/v2/embed": {"texts": {"type": "array", "items": TEXT}},
    "/pooling": {"input": ONE_OR_MORE},
    "/classify": {"input": ONE_OR_MORE},
    "/score": SCORED,
    "/v1/score": SCORED,
    "/rerank": RANKED,
    "/v1/rerank": RANKED,
    "/v2/rerank": RANKED,
    "/tokenize": {"prompt": TEXT, "messages": MESSAGES},
    "/detokenize": {"tokens*": TOKENS},
}
NAME: Json = {"type": "string", "minLength": 1, "description": "One of `GET /v1/models`, or its alias."}
FORM: Json = {
    "type": "object",
    "properties": {"model": {**NAME, "maxLength": 512}, "file": {"type": "string", "format": "binary"}},
    "required": ["model", "file"],
}
REFUSALS = {  # docs/errors.md tells of the codes
    400: "The request is wrong; or its engine says so.",
    401: "No key, or one that is wrong, expired or revoked.",
    403: "The key may not use this model.",
    404: "There is no such model, response or route; or the engine says so.",
    408: "The rest of it did not come in time.",
    413: "The body is larger than `requests.max_body`.",
    415: "The engine reads no such Content-Type.",
    422: "The engine's own word for a 400.",
    429: "A limit of the key, or a full queue.",
    431: "The head is too large.",
    500: "A fault, here or at the engine.",
    501: "The engine cannot do it.",
    502: "The engine died before the first byte.",
    503: "The model is stopped, has failed, or is not ready in time.",
}
LATER = (429, 502, 503)  # these say when to come back
ERROR: Json = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": TEXT,
                "type": {"type": ["string", "null"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
            "required": ["message"],
        }
    },
    "required": ["error"],
}
ANTHROPIC_ERROR: Json = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {"type": "object", "properties": {"type": TEXT, "message": TEXT}, "required": ["type", "message"]},
        "request_id": {"type": ["string", "null"]},
    },
    "required": ["type", "error"],
}
MODEL: Json = {
    "type": "object",
    "properties": {
        "id": TEXT,
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": TEXT,
        "aliases": {"type": "array", "items": TEXT},
        "parent": {**TEXT, "description": "Of a LoRA adapter: its model."},
        "state": TEXT,
    },
    "required": ["id", "object", "created", "owned_by", "aliases", "state"],
}
HEADERS: Mapping[str, tuple[str, str, Json]] = {
    "priority": ("X-Priority", "The highest that waits is served first.", {"type": "integer", "minimum": -8, "maximum": 8}),
    "timeout": (
        "X-Request-Timeout",
        "How many seconds the client waits for its turn.",
        {"type": "string", "pattern": r"^(?=.*[1-9])[0-9]{1,9}(\.[0-9]+)?$"},
    ),
    "progress": ("X-Progress", "With `stream`: comments while it waits.", {"enum": ["sse"]}),
}


def document(table: Iterable[Route]) -> Json:
    """OpenAPI 3.1."""
    paths: dict[str, Json] = {
        "/v1/models": {"get": _own("All models that the key may use.", _object({"object": {"const": "list"}, "data": _list("Model")}))},
        "/v1/models/{name}": {
            "get": {
                **_own("One model; its name may have slashes.", _ref("Model"), missing=True),
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}],
            }
        },
        "/health": {"get": {**_own("The daemon's own, for whoever asks.", _object({"status": {"const": "ok"}})), "security": []}},
    }
    talks = []
    for route in table:
        if route.model is Model.TALK:
            talks.append(route.path)
        else:
            paths.setdefault(route.path, {})[route.method.lower()] = _forwarded(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "orchestrator",
            "version": __version__,
            "description": f"All but GET /v1/models and /health goes to the engine of the model. WebSockets: {', '.join(talks)}.",
        },
        "security": [{"bearer": []}, {"x-api-key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR, "Model": MODEL},
            "responses": {f"{shape}{status}": _refusal(status, shape) for shape in ("Error", "AnthropicError") for status in REFUSALS},
            "parameters": {
                key: {"name": name, "in": "header", "description": why, "schema": schema} for key, (name, why, schema) in HEADERS.items()
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _forwarded(route: Route) -> Json:
    found: Json = {"summary": f"Goes to an engine. The model: {route.model.value}.", "responses": _responses(route)}
    if route.model is Model.ID:
        schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,200}$"}
        return {**found, "parameters": [{"name": "id", "in": "path", "required": True, "schema": schema}]}
    names = [name for name in HEADERS if name != "progress" or route.streams]
    found["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in names]
    content = {"multipart/form-data": {"schema": FORM}} if route.model is Model.FORM else {"application/json": {"schema": _body(route)}}
    return {**found, "requestBody": {"required": True, "content": content}}


def _body(route: Route) -> Json:
    fields = FIELDS.get(route.path, {})
    properties: Json = {"model": NAME, **{name.rstrip("*"): schema for name, schema in fields.items()}}
    if route.streams:
        properties["stream"] = {"type": "boolean"}
    required = [name.rstrip("*") for name in fields if name.endswith("*")]
    if route is RESPONSES:
        named = [{"required": ["model"]}, {"required": ["previous_response_id"]}]
        return {"type": "object", "properties": properties, "required": required, "anyOf": named}
    return {"type": "object", "properties": properties, "required": ["model", *required]}


def _responses(route: Route) -> Json:
    kinds = ["application/json"]
    if route.streams or route.model is Model.FORM:
        kinds.append("text/event-stream")
    if route.model is Model.FORM:
        kinds.append("text/plain")
    shape = "AnthropicError" if route.is_anthropic else "Error"
    answer: Json = {"description": "The engine's answer, as it is.", "content": {kind: {} for kind in kinds}}
    return {"200": answer, **{str(status): _ref(f"{shape}{status}", "responses") for status in REFUSALS}}


def _own(what: str, schema: Json, missing: bool = False) -> Json:
    found: Json = {"200": {"description": "OK", "content": {"application/json": {"schema": schema}}}}
    for status in (401, 404) if missing else (401,):
        found[str(status)] = _ref(f"Error{status}", "responses")
    return {"summary": what, "responses": found}


def _refusal(status: int, shape: str) -> Json:
    schema = _ref(shape)
    if status == 404:  # an engine that has no such route has its own words for it
        schema = {"anyOf": [schema, _object({"detail": TEXT})]}
    found: Json = {"description": REFUSALS[status], "content": {"application/json": {"schema": schema}}}
    if status in LATER:
        found["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
    return found


def _object(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(name: str) -> Json:
    return {"type": "array", "items": _ref(name)}


def _ref(name: str, kind: str = "schemas") -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}
