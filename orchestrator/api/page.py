"""The page's own files, as they lie in api/ui: read once, no build step, nothing from another host.

They hold no secret and ask for no key; what the page shows it asks for itself. The headers are the wall behind `textContent`: a name
that a user made up could not run as a script even where the page failed to treat it as text.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

FOLDER = Path(__file__).parent / "ui"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again by its ETag: an upgrade is seen at once
}


class Page:
    def __init__(self, folder: Path = FOLDER) -> None:
        self._files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in sorted(folder.iterdir()) if path.suffix in TYPES}
        self._etags = {name: f'"{hashlib.sha256(data).hexdigest()[:16]}"' for name, (data, _) in self._files.items()}
        self.version = hashlib.sha256("".join(self._etags.values()).encode()).hexdigest()[:16]  # a page that is open learns of another

    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)
        router.add_api_route("/ui", self._one("index.html"), methods=["GET"])
        router.add_api_route("/ui/", _without_slash, methods=["GET"])
        for name in self._files:
            router.add_api_route(f"/ui/{name}", self._one(name), methods=["GET"])
        return router

    def _one(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        data, kind = self._files[name]
        headers = {**HEADERS, "ETag": self._etags[name]}

        async def one(request: Request) -> Response:
            if request.headers.get("if-none-match") == headers["ETag"]:
                return Response(None, 304, headers)
            return Response(data, headers=headers, media_type=kind)

        return one


async def _without_slash() -> Response:
    """Relative, as all addresses in the page: it may stand behind a prefix."""
    return RedirectResponse("../ui")
