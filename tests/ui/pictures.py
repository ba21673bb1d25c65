"""Pictures of the page for docs/: `python -m tests.ui.pictures [FOLDER]`. A real daemon, a simulated GPU, headless Chromium.

Models of different sizes share a card with somebody else's job, which grows and shrinks; requests come in bursts. Five minutes.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from bench.box import ROOT, Box
from bench.foreign import Foreign, ForeignError, on_simulated
from bench.workloads import burst, client
from tests.ui.browser import Browser, Page
from tests.ui.tunnel import tunnel

GIB = 1 << 30
SCENE_S, TAKE_S = 290.0, 12.0
SHAPE = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 32_000, "tie_word_embeddings": True, "max_position_embeddings": 32_768}
# layers, hidden size, inner size, heads, KV heads
MODELS = {
    "embed-small": (12, 1024, 4096, 16, 4),
    "llama-8b": (28, 4096, 13_000, 32, 8),
    "mistral-7b-instruct": (32, 4096, 9000, 32, 8),
    "qwen-0.5b": (24, 896, 4864, 14, 2),
    "team-a/coder-14b": (28, 5120, 13_000, 40, 8),
    "qwen-32b": (64, 5120, 22_000, 40, 8),
}
LARGE = "qwen-32b"
# requests, tokens of the prompt, tokens of the answer
BURSTS = {
    "llama-8b": (24, 5000, 700),
    "team-a/coder-14b": (10, 6000, 900),
    "mistral-7b-instruct": (24, 4000, 500),
    "qwen-0.5b": (8, 800, 400),
}


def main(words: list[str]) -> int:
    into = Path(words[0]) if words else ROOT / "docs/pictures"
    into.mkdir(parents=True, exist_ok=True)
    env = {"ORCH_GPUS__SOURCE": "simulated", "ORCH_GPUS__SIMULATED__MEMORY": "80GiB", "SIM_LOAD_S": "1.0", "SIM_STEP_S": "0.03"}
    with Box(env=env, sampled=False) as box, tunnel(box.socket) as url, Browser() as browser, browser.page() as page:
        page.size(1320, 1010)
        page.open(f"{url}/ui")
        for name in MODELS:
            _add(box, name)
        box.until_ready([name for name in MODELS if name != LARGE], 120)
        box.ctl("pin", "embed-small")
        box.ctl("load", LARGE, check=False)
        card = box.status()["gpus"][0]["uuid"]
        with Foreign(on_simulated(box.folder / "run/simgpu", card), box.folder / "foreign.log") as foreign:
            asyncio.run(_scene(box, foreign, lambda: _take(page, into)))
    return 0


def _add(box: Box, name: str) -> None:
    layers, hidden, inner, heads, kv_heads = MODELS[name]
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    folder = box.folder / "models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**SHAPE, **shape, "num_attention_heads": heads, "num_key_value_heads": kv_heads}))
    box.ctl("add-model", name, str(folder), "--no-start" if name == LARGE else "--no-wait")


async def _scene(box: Box, foreign: Foreign, take: Callable[[], None]) -> None:
    """Until SCENE_S have passed: each model has its own rhythm, and the stranger comes and goes. `take` is called near the end."""
    end = time.monotonic() + SCENE_S
    async with client(box.url) as api:

        async def works(name: str, pause_s: float) -> None:
            requests, prompt, tokens = BURSTS[name]
            while time.monotonic() < end:
                await burst(api, name, requests, prompt, tokens)
                await asyncio.sleep(pause_s)

        async def comes_and_goes() -> None:
            await asyncio.sleep(SCENE_S * 0.3)
            for step in (4, 3, 3):
                with contextlib.suppress(ForeignError):  # the engines were quicker
                    await asyncio.to_thread(foreign.take, step * GIB)
                await asyncio.sleep(3.0)
            await asyncio.sleep(SCENE_S * 0.3)
            await asyncio.to_thread(foreign.give, 3 * GIB)

        async with asyncio.TaskGroup() as group:
            for name, pause_s in zip(BURSTS, (16.0, 34.0, 25.0, 40.0), strict=True):
                group.create_task(works(name, pause_s))
            group.create_task(comes_and_goes())
            await asyncio.sleep(SCENE_S - TAKE_S)
            await asyncio.to_thread(take)


def _take(page: Page, into: Path) -> None:
    for theme in ("light", "dark"):
        page.prefer(theme)
        _settle(page)
        _picture(page, into / f"ui-{theme}.png")
    page.size(360, 780, 2.0)
    _settle(page)
    _picture(page, into / "ui-phone.png")


def _picture(page: Page, path: Path) -> None:
    """256 colours are enough, and a third of the bytes."""
    page.picture(path)
    with Image.open(path) as taken:
        taken.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _settle(page: Page) -> None:
    """Until a line has come and two frames were drawn."""
    page.js("new Promise((done) => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 1500))")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
