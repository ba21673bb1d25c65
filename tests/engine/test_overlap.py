"""What is made while EngineCore starts, with stand-ins for vLLM's modules that have its names and its order. In a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from orchestrator.drivers.vllm import SERVE

MODULES = {
    "zmq.py": """
        ROUTER = 6
        class Poller:
            def poll(self, timeout=None):
                said.append("polled")
                return [1]
        said = []
    """,
    "vllm/__init__.py": "",
    "vllm/v1/__init__.py": "",
    "vllm/v1/engine/__init__.py": "",
    "vllm/v1/engine/utils.py": """
        import zmq
        def start_core():
            zmq.said.append("core begun")
            poller = zmq.Poller()
            poller.poll()
            zmq.said.append(f"core answered over {zmq.ROUTER}")
            poller.poll()
            zmq.said.append("core ready")
    """,
    "vllm/v1/engine/async_llm.py": """
        import zmq
        from vllm.v1.engine import utils
        class Renderer:
            def __init__(self, config):
                if config == "broken":
                    raise ValueError("no tokenizer")
                zmq.said.append(f"renderer of {config}")
                self.tokenizer = "tokenizer"
        renderer_from_config = Renderer
        class InputProcessor:
            def __init__(self, config, renderer):
                zmq.said.append(f"input processor with {type(renderer).__name__}")
        class OutputProcessor:
            def __init__(self, tokenizer, log_stats):
                zmq.said.append(f"output processor with {tokenizer}")
        class AsyncLLM:
            def __init__(self, config):
                self.renderer = renderer = renderer_from_config(config)
                self.input_processor = InputProcessor(config, renderer)
                self.output_processor = OutputProcessor(renderer.tokenizer, log_stats=True)
                self.engine_core = utils.start_core()
                self._run_output_handler()
            def _run_output_handler(self):
                kinds = (self.renderer, self.input_processor, self.output_processor)
                zmq.said.append(" ".join(type(kind).__name__ for kind in kinds))
    """,
    "vllm/v1/structured_output.py": """
        class Tokenizer:
            pass
        def cached_tokenizer_from_config(model_config):
            if model_config == "broken":
                raise ValueError("no tokenizer")
            return Tokenizer()
        class StructuredOutputManager:
            def __init__(self, model_config):
                if model_config:
                    self.tokenizer = cached_tokenizer_from_config(model_config=model_config)
            def grammar(self):
                return type(self.tokenizer).__name__
    """,
}


def said(tmp_path: Path, code: str, **instead: str) -> Any:
    for name, body in (MODULES | {name.replace("__", "/") + ".py": body for name, body in instead.items()}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(body))
    places = os.pathsep.join([str(tmp_path), str(SERVE.parent)])
    code = f"import json, overlap\noverlap.install()\n{textwrap.dedent(code)}"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": places}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


START = """
    import zmq
    from vllm.v1.engine.async_llm import AsyncLLM
    try:
        AsyncLLM("{config}")
    except ValueError as error:
        zmq.said.append(str(error))
    print(json.dumps(zmq.said))
"""
MADE = ["renderer of m", "input processor with Renderer", "output processor with tokenizer"]
THEMSELVES = "Renderer InputProcessor OutputProcessor"


def test_the_api_servers_things_are_made_when_the_core_has_begun(tmp_path: Path) -> None:
    core = ["core begun", "polled", "core answered over 6"]
    assert said(tmp_path, START.format(config="m")) == [*core, *MADE, "polled", "core ready", THEMSELVES]


def test_where_nobody_polls_twice_they_are_made_before_the_first_request(tmp_path: Path) -> None:
    once = "import zmq\ndef start_core():\n    zmq.Poller().poll()"
    assert said(tmp_path, START.format(config="m"), vllm__v1__engine__utils=once) == ["polled", *MADE, THEMSELVES]


def test_what_can_not_be_made_ends_the_start(tmp_path: Path) -> None:
    assert said(tmp_path, START.format(config="broken"))[-1] == "no tokenizer"


def test_a_vllm_of_other_names_starts_in_its_own_order(tmp_path: Path) -> None:
    other = MODULES["vllm/v1/engine/async_llm.py"].replace("renderer_from_config", "make_renderer")
    core = ["core begun", "polled", "core answered over 6", "polled", "core ready"]
    assert said(tmp_path, START.format(config="m"), vllm__v1__engine__async_llm=other) == [*MADE, *core, THEMSELVES]


def test_structured_output_has_its_tokenizer_when_it_asks(tmp_path: Path) -> None:
    code = """
        from vllm.v1.structured_output import StructuredOutputManager as Manager
        def asked(config):
            try:
                return Manager(config).grammar()
            except (ValueError, AttributeError) as error:
                return f"{type(error).__name__}: {error}"
        print(json.dumps([asked("m"), asked("broken"), asked(None)]))
    """
    assert said(tmp_path, code) == ["Tokenizer", "ValueError: no tokenizer", "AttributeError: tokenizer"]
