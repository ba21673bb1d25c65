"""EngineCore first: what the API server and EngineCore make for themselves is made while somebody else is waited for.

vLLM loads the tokenizer, copies it and builds its processors (1.7 s, Qwen2.5), then starts EngineCore and only waits for it. Here that
begins when EngineCore has begun. EngineCore, which would have found the tokenizer loaded, loads it beside its start: only structured
output needs it there. The same is made, in another order, and what stands for it meanwhile is gone before the first request. Checked
with vLLM 0.24.0; where another version has these names no more, it is left as it is, with a line in the log.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

MADE_BEFORE_ENGINE_CORE = ("renderer_from_config", "InputProcessor", "OutputProcessor")


class Later:
    """Stands for what `make` returns until somebody asks something of it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._turn, self._made = make, threading.Lock(), False
        self._value: Any = None

    def now(self) -> Any:
        """Raises what `make` raises, each time."""
        with self._turn:
            if not self._made:
                self._value, self._made = self._make(), True
        return self._value

    def begin(self) -> None:
        """Make it beside what happens now. What goes wrong is raised where it is needed."""
        threading.Thread(target=self._try, daemon=True).start()

    @property
    def tokenizer(self) -> "Later":
        return Later(lambda: self.now().tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now(), name)

    def _try(self) -> None:
        with contextlib.suppress(Exception):
            self.now()


def now(value: Any) -> Any:
    return value.now() if isinstance(value, Later) else value


def install() -> None:
    for change in (_api_server, _engine_core):
        try:
            change()
        except (ImportError, AttributeError) as error:
            print(f"this vLLM starts in its own order: {error}", flush=True)


def _api_server() -> None:
    from vllm.v1.engine import async_llm, utils

    pending: list[Later] = []
    makers = {name: getattr(async_llm, name) for name in MADE_BEFORE_ENGINE_CORE}
    start_of_outputs = async_llm.AsyncLLM._run_output_handler

    def deferred(make: Callable[..., Any]) -> Callable[..., Later]:
        def begin(*args: Any, **kwargs: Any) -> Later:
            later = Later(lambda: make(*map(now, args), **{key: now(value) for key, value in kwargs.items()}))
            pending.append(later)
            return later

        return begin

    def while_it_starts() -> None:
        while pending:
            made = pending.pop(0).now()
            _chat_template(made)

    def run_output_handler(self: Any) -> None:
        pending.clear()
        for name, value in list(vars(self).items()):
            if isinstance(value, Later):
                setattr(self, name, value.now())
        start_of_outputs(self)

    utils.zmq = _Zmq(utils.zmq, while_it_starts)
    async_llm.AsyncLLM._run_output_handler = run_output_handler
    for name, make in makers.items():
        setattr(async_llm, name, deferred(make))


class _Zmq:
    """zmq as vLLM's wait for its cores sees it: a second poll means that a core has greeted, was answered, and is at work."""

    def __init__(self, zmq: Any, meanwhile: Callable[[], None]) -> None:
        class Poller(zmq.Poller):  # type: ignore[misc]
            polls = 0

            def poll(self, timeout: float | None = None) -> Any:
                self.polls += 1
                if self.polls == 2:
                    meanwhile()
                return super().poll(timeout)

        self._zmq, self.Poller = zmq, Poller

    def __getattr__(self, name: str) -> Any:
        return getattr(self._zmq, name)


def _chat_template(renderer: Any) -> None:
    """Fill the cache in which the first chat would look: a processor is looked for, which loads the tokenizer once more."""
    try:
        from vllm.renderers import hf

        if isinstance(renderer, hf.HfRenderer) and renderer.tokenizer is not None:
            hf._try_get_processor_chat_template(renderer.tokenizer, trust_remote_code=renderer.model_config.trust_remote_code)
    except Exception as error:
        print(f"the chat template is looked for later: {type(error).__name__}: {error}", flush=True)


def _engine_core() -> None:
    from vllm.v1 import structured_output

    load = structured_output.cached_tokenizer_from_config

    def beside(*args: Any, **kwargs: Any) -> Later:
        later = Later(lambda: load(*args, **kwargs))
        later.begin()
        return later

    structured_output.cached_tokenizer_from_config = beside
    structured_output.StructuredOutputManager.tokenizer = _Settled()


class _Settled:
    """The attribute `tokenizer`: what uses it asks for its class, and so gets the thing itself."""

    def __get__(self, manager: Any, kind: Any = None) -> Any:
        if manager is None:
            return self
        try:
            return now(vars(manager)["tokenizer"])
        except KeyError:
            raise AttributeError("tokenizer") from None

    def __set__(self, manager: Any, value: Any) -> None:
        vars(manager)["tokenizer"] = value
