"""The table of routes: each path of an engine that a user may reach, by method, and where a request there names its model.

It is an allow-list: engines run with development endpoints (sleep, collective_rpc, …) that nobody may reach through us. What goes to an
engine is the path as it stands here, or an id that is a plain word: never the client's own spelling of it.
"""

import re
from dataclasses import dataclass
from enum import Enum

from orchestrator.errors import RouteNotFound

ID = re.compile(r"/v1/responses/([A-Za-z0-9_-]{1,200})(/cancel)?")


class Model(Enum):
    """Where a request names its model, as docs/api.md says it."""

    BODY = "`model` of the JSON body"
    FORM = "`model` of the form"
    ID = "the engine that made it"
    TALK = "`?model=`, or `model` of the first event"


@dataclass(frozen=True, slots=True)
class Route:
    """`streams`: `stream` is a field of its body. `counts`: a stream of it says what it used only if it is asked to."""

    method: str
    path: str
    model: Model = Model.BODY
    streams: bool = False
    counts: bool = False

    @property
    def is_anthropic(self) -> bool:
        return is_anthropic(self.path)


TABLE = (
    Route("POST", "/v1/chat/completions", streams=True, counts=True),
    Route("POST", "/v1/chat/completions/batch"),
    Route("POST", "/v1/chat/completions/render"),
    Route("POST", "/v1/chat/completions/derender"),
    Route("POST", "/v1/completions", streams=True, counts=True),
    Route("POST", "/v1/completions/render"),
    Route("POST", "/v1/completions/derender"),
    Route("POST", "/v1/responses", streams=True),
    Route("GET", "/v1/responses/{id}", Model.ID),
    Route("POST", "/v1/responses/{id}/cancel", Model.ID),
    Route("POST", "/v1/messages", streams=True),
    Route("POST", "/v1/messages/count_tokens"),
    Route("POST", "/v1/embeddings"),
    Route("POST", "/v2/embed"),
    Route("POST", "/pooling"),
    Route("POST", "/classify"),
    Route("POST", "/score"),
    Route("POST", "/v1/score"),
    Route("POST", "/rerank"),
    Route("POST", "/v1/rerank"),
    Route("POST", "/v2/rerank"),
    Route("POST", "/tokenize"),
    Route("POST", "/detokenize"),
    Route("POST", "/v1/audio/transcriptions", Model.FORM),
    Route("POST", "/v1/audio/translations", Model.FORM),
    Route("WS", "/v1/realtime", Model.TALK),
)
RESPONSES = next(route for route in TABLE if route.path == "/v1/responses")
# By what a client writes: where nothing has to be known of an answer but what it used.
DIRECT = {route.path.encode(): route for route in TABLE if route.model is Model.BODY and route is not RESPONSES}


def is_anthropic(path: str) -> bool:
    """Errors there have the shape that Anthropic's clients read."""
    return path == "/v1/messages" or path == "/v1/messages/count_tokens"


def is_escaped(raw_path: bytes) -> bool:
    """A slash that is written %2F is no slash of ours: whoever reads the path next may think otherwise."""
    return b"%" in raw_path and b"%2f" in raw_path.lower()


def by_id(method: str, path: str) -> tuple[str, str] | None:
    """The path at an engine and the id in it, where it is that of one response."""
    found = ID.fullmatch(path)
    if found is None or method != ("POST" if found[2] else "GET"):
        return None
    return path, found[1]


def missing(method: str, path: str) -> RouteNotFound:
    return RouteNotFound(f"There is no route {method} {path} here.")
