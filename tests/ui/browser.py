"""A headless Chromium, driven by its own protocol (CDP) over a WebSocket: what a test needs of a browser, and no more.

Everything that goes wrong in a page is kept: errors on its console, requests to other hosts, answers that it did not expect.
"""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DEADLINE_S = 20.0
POLL_S = 0.03
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "ArrowRight": (39, ""), " ": (32, " ")}


class Page:
    """One tab, in a profile of its own: what it keeps (keys, theme) no other sees."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser, self._session = browser, session
        self.errors: list[str] = []
        self.asked: list[str] = []

    def listen(self) -> None:
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> Any:
        return self._browser.call(method, given, self._session)

    def heard(self, method: str, told: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(str([argument.get("value", argument.get("description")) for argument in told["args"]]))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])

    # ---- as a person --------------------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600)

    def prefer(self, theme: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def press(self, key: str, shift: bool = False) -> None:
        number, text = KEYS[key]
        given = {"key": key, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """As an assistive device does it."""
        self.until(f"document.querySelector({json.dumps(selector)})", f"{selector} is there")
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    # ---- as a test ----------------------------------------------------------------------------------------------------

    def js(self, expression: str) -> Any:
        """Its value. Raises AssertionError for what is thrown in the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, expression: str, what: str, deadline_s: float = DEADLINE_S) -> Any:
        """The first true value of `expression`."""
        end = time.monotonic() + deadline_s
        while not (value := self._maybe(f"(() => {{ const found = ({expression}); return found instanceof Node ? true : found }})()")):
            assert time.monotonic() < end, f"not within {deadline_s:.0f} s: {what}; errors: {self.errors}; {self.text()[:2000]}"
            time.sleep(POLL_S)
        return value

    def text(self, selector: str = "body") -> str:
        return str(self._maybe(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def _maybe(self, expression: str) -> Any:
        """None while a page makes place for another, or is not there yet."""
        with contextlib.suppress(RuntimeError, AssertionError):
            return self.js(expression)

    def strangers(self, url: str) -> list[str]:
        """Requests to any other host than that of `url`."""
        return [asked for asked in self.asked if urlsplit(asked).netloc != urlsplit(url).netloc and not asked.startswith("data:")]


class Browser:
    def __enter__(self) -> Self:
        assert CHROMIUM is not None
        self._stack = contextlib.ExitStack()
        self._folder = tempfile.TemporaryDirectory(prefix="o-chromium-", ignore_cleanup_errors=True)
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"]
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
        folder = Path(self._folder.name)
        self._process = subprocess.Popen(
            [CHROMIUM, *words, *quiet, f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = folder / "DevToolsActivePort"
        end = time.monotonic() + DEADLINE_S
        while not (port.exists() and len(lines := port.read_text().splitlines()) == 2):
            assert time.monotonic() < end, "Chromium did not come up"
            assert self._process.poll() is None, "Chromium ended"
            time.sleep(POLL_S)
        self._socket: ClientConnection = self._stack.enter_context(
            connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", max_size=None, max_queue=None, compression=None, ping_interval=None)
        )
        self._ids = itertools.count(1)
        self._pages: dict[str, Page] = {}
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close", {})
        self._stack.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    @contextlib.contextmanager
    def page(self) -> Iterator[Page]:
        context = self.call("Target.createBrowserContext", {})["browserContextId"]
        target = self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        page.listen()
        try:
            yield page
        finally:
            del self._pages[session]
            self.call("Target.disposeBrowserContext", {"browserContextId": context})

    def call(self, method: str, given: dict[str, Any], session: str | None = None) -> Any:
        """Its result. Raises RuntimeError with Chromium's words."""
        asked = next(self._ids)
        message = {"id": asked, "method": method, "params": given, **({"sessionId": session} if session else {})}
        self._socket.send(json.dumps(message))
        while True:
            told = json.loads(self._socket.recv(DEADLINE_S))
            if told.get("id") == asked:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']['message']}")
                return told["result"]
            if "method" in told and (page := self._pages.get(told.get("sessionId", ""))) is not None:
                page.heard(told["method"], told["params"])
