"""The engines' own metrics (vLLM's), merged, at /metrics/engines: each line gets the model that it is of, and each family is told once.

Asked of all at the same time and only of those that are ready, for SCRAPE_S at most: one that hangs, sleeps, says too much or nothing
that Prometheus reads is left out, and the others are shown. Lines are relabelled as they are: parsing them takes twenty times as long.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.api.upstream import Upstreams
from orchestrator.control.reconciler import View
from orchestrator.policy.instance import State

SCRAPE_S = 2.0  # an engine answers in 10 ms
MOST_BYTES = 2 << 20  # of one engine's; vLLM 0.24 says 100 KiB
REQUEST = b"GET /metrics HTTP/1.1\r\nhost: engine\r\naccept: text/plain\r\n\r\n"
NAME = rb"[A-Za-z_:][A-Za-z0-9_:]*"
LABEL = rb'[A-Za-z_][A-Za-z0-9_]*="(?:[^"\\\n]|\\.)*"'
NUMBER = rb"[-+]?(?:[0-9]+\.?[0-9]*(?:[eE][-+]?[0-9]+)?|Inf|NaN)"
LINE = re.compile(rb"(%b)(?:\{(%b(?:,%b)*)?,?\})? (%b(?: -?[0-9]+)?)" % (NAME, LABEL, LABEL, NUMBER))
HEAD = re.compile(rb"# (?:(HELP) (%b) .*|(TYPE) (%b) (?:counter|gauge|histogram|summary|untyped))" % (NAME, NAME))
OWN = re.compile(rb'(^|,)model="')
LEFT_OUT = (b"python_", b"process_")  # of its API server, and of no use under another name
SCRAPED = b"orchestrator_engine_scraped"
HELP = b"# HELP %b 1 where the metrics of a ready engine are here, 0 where it did not give any.\n# TYPE %b gauge\n" % (SCRAPED, SCRAPED)


@dataclass(slots=True)
class _Family:
    told: list[bytes] = field(default_factory=list)  # HELP and TYPE
    lines: list[bytes] = field(default_factory=list)


class EngineMetrics:
    def __init__(self, upstreams: Upstreams, view: Callable[[], View | None]) -> None:
        self._upstreams, self._view = upstreams, view
        self._asking: asyncio.Task[bytes] | None = None

    async def merged(self) -> bytes:
        """The text. Who asks while it is being made gets the same one."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._merge())
        return await asyncio.shield(self._asking)

    async def _merge(self) -> bytes:
        view = self._view()
        ready = {i.model: i.launch.id for i in view.plan.instances.values() if i.launch and i.state is State.READY} if view else {}
        texts = await asyncio.gather(*(self._ask(launch_id) for launch_id in ready.values()))
        families: dict[bytes, _Family] = {}
        scraped = [HELP]
        for model, text in sorted(zip(ready, texts, strict=True)):
            label = b'model="%b"' % model.replace("\\", "\\\\").replace('"', '\\"').encode()
            is_good = bool(text) and add(families, text, label)
            scraped.append(b"%b{%b} %d\n" % (SCRAPED, label, is_good))
            await asyncio.sleep(0)  # requests pass in between
        return b"".join([*scraped, *(line for one in families.values() for line in (*one.told, *one.lines) if one.lines)])

    async def _ask(self, launch_id: str) -> bytes:
        """b"" where it gave none."""
        try:
            async with asyncio.timeout(SCRAPE_S):
                answer = await self._upstreams.of(launch_id).ask(REQUEST, b"")
                try:
                    text = b""
                    while answer.status == 200 and len(text) <= MOST_BYTES and (part := await answer.read()):
                        text += part
                    return text if answer.whole and len(text) <= MOST_BYTES else b""
                finally:
                    answer.release()
        except OSError:  # TimeoutError among them
            return b""


def add(families: dict[bytes, _Family], text: bytes, label: bytes) -> bool:
    """One engine's text. A line that is none would make Prometheus refuse all of it, so it is left out. Whether there was one that is."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    family, found = b"", False
    for line in text.split(b"\n"):
        if line.startswith(b"#"):
            if (head := HEAD.fullmatch(line)) and not line[7:].startswith(LEFT_OUT):
                family = head[2] or head[4]
                told = families.setdefault(family, _Family()).told
                if not any(one.startswith(line[:7]) for one in told):
                    told.append(line + b"\n")
        elif (sample := LINE.fullmatch(line)) and not line.startswith(LEFT_OUT):
            name, labels = sample[1], sample[2]
            of = family if family and name.startswith(family) else name
            inner = b"%b,%b" % (label, OWN.sub(rb'\1exported_model="', labels)) if labels else label
            families.setdefault(of, _Family()).lines.append(b"%b{%b} %b\n" % (name, inner, sample[3]))
            found = True
    return found
