"""What a forked vLLM engine finds set anew, with stand-ins for the modules of vLLM and kvcached that froze it. In a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from orchestrator.drivers.vllm import SERVE

MODULES = {
    "kvcached/__init__.py": "",
    "kvcached/utils.py": """
        import logging, os
        from typing import Optional
        GPU_UTILIZATION = float(os.getenv("KVCACHED_GPU_UTILIZATION", "0.95"))
        MAX_CACHED_TOKENS = int(os.getenv("KVCACHED_MAX_CACHED_TOKENS", "16000"))
        CONTIGUOUS_LAYOUT = os.getenv("KVCACHED_CONTIGUOUS_LAYOUT", "true").lower() == "true"
        DEFAULT_IPC_NAME = os.getenv("KVCACHED_IPC_NAME") or "kvcached_vLLM_1"
        SHM_DIR = "/dev/shm"
        _LEVEL_TO_COLOR = {logging.DEBUG: "x"}
        def get_tp_socket_dir():
            return "/tmp/kvcached-tp-" + DEFAULT_IPC_NAME
        def get_log_level():
            return getattr(logging, os.getenv("KVCACHED_LOG_LEVEL", "INFO").upper())
        def get_kvcached_logger(name="kvcached"):
            logger = logging.getLogger(name)
            if not logger.handlers:
                logger.addHandler(logging.StreamHandler())
                logger.setLevel(get_log_level())
            return logger
        get_kvcached_logger()
    """,
    "kvcached/tp_ipc_util.py": "from kvcached.utils import get_tp_socket_dir\nSOCKET_DIR = get_tp_socket_dir()",
    "kvcached/kv_cache_manager.py": "from kvcached.utils import CONTIGUOUS_LAYOUT, DEFAULT_IPC_NAME, SHM_DIR",
    "kvcached/integration/__init__.py": "from kvcached.utils import CONTIGUOUS_LAYOUT\n_contiguous_layout: bool = CONTIGUOUS_LAYOUT",
    "vllm/__init__.py": "",
    "vllm/platforms.py": """
        import functools, os
        class Platform:
            @classmethod
            @functools.cache
            def capability(cls, device=0):
                return os.environ.get("CUDA_VISIBLE_DEVICES")
        class Cuda(Platform):
            @staticmethod
            @functools.cache
            def name():
                return os.environ.get("CUDA_VISIBLE_DEVICES")
        current_platform = Cuda()
    """,
}
SCRIPT = """
    import json, multiprocessing.spawn, os, sys
    import kvcached.integration, kvcached.kv_cache_manager, kvcached.tp_ipc_util, kvcached.utils, preloaded
    from vllm.platforms import current_platform as gpu
    before = [gpu.capability(0), gpu.name(), kvcached.utils.DEFAULT_IPC_NAME]
    os.environ.update(json.loads(sys.argv[1]))
    preloaded.refresh()
    manager = vars(kvcached.kv_cache_manager)
    print(json.dumps({
        "before": before, "gpu": [gpu.capability(0), gpu.name()],
        "ipc": [kvcached.utils.DEFAULT_IPC_NAME, manager["DEFAULT_IPC_NAME"]], "shm": manager["SHM_DIR"],
        "sockets": kvcached.tp_ipc_util.SOCKET_DIR,
        "layout": [kvcached.utils.CONTIGUOUS_LAYOUT, manager["CONTIGUOUS_LAYOUT"], kvcached.integration._contiguous_layout],
        "tokens": kvcached.utils.MAX_CACHED_TOKENS, "level": kvcached.utils.get_kvcached_logger().level,
        "main": multiprocessing.spawn.get_preparation_data("x")["init_main_from_path"],
    }))
"""


def found(tmp_path: Path, **env: str) -> dict[str, Any]:
    for name, body in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(body))
    script = tmp_path / "launch_server.py"
    script.write_text(textwrap.dedent(SCRIPT))
    places = os.pathsep.join([str(tmp_path), str(SERVE.parent)])
    command = [sys.executable, str(script), json.dumps(env)]
    done = subprocess.run(command, env={"PYTHONPATH": places}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_what_kvcached_read_when_it_was_imported_is_read_anew_wherever_it_went(tmp_path: Path) -> None:
    mine = {"KVCACHED_IPC_NAME": "orch-a", "KVCACHED_MAX_CACHED_TOKENS": "7", "KVCACHED_CONTIGUOUS_LAYOUT": "false"}
    seen = found(tmp_path, **mine, KVCACHED_LOG_LEVEL="debug")
    assert seen["before"][2] == "kvcached_vLLM_1"
    assert (seen["ipc"], seen["sockets"]) == (["orch-a", "orch-a"], "/tmp/kvcached-tp-orch-a")
    assert seen["layout"] == [False, False, False]
    assert (seen["tokens"], seen["level"], seen["shm"]) == (7, 10, "/dev/shm")


def test_what_is_known_of_gpus_is_asked_anew(tmp_path: Path) -> None:
    seen = found(tmp_path, CUDA_VISIBLE_DEVICES="GPU-7")
    assert (seen["before"][:2], seen["gpu"]) == ([None, None], ["GPU-7", "GPU-7"])


def test_a_process_that_vllm_spawns_begins_with_serve(tmp_path: Path) -> None:
    """As if serve.py had been executed: it installs our calls there too."""
    assert found(tmp_path)["main"] == str(SERVE)


@pytest.mark.parametrize("answer", [0, 3, 100])
def test_a_fork_is_asked_whether_it_may_use_the_gpu(tmp_path: Path, answer: int) -> None:
    """A libcuda that answers so: 3 means that the parent had called it, 100 that there is no GPU."""
    (tmp_path / "ctypes.py").write_text(f"class CDLL:\n    def __init__(self, name): pass\n    def cuInit(self, flags): return {answer}\n")
    code = "import preloaded; print(preloaded._forks_may_use_the_gpu())"
    places = os.pathsep.join([str(tmp_path), str(SERVE.parent)])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": places}, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(answer != 3)


REHEARSAL = """
    import preloaded, sys
    for name in preloaded._imported_late():
        __import__(name)
    print(sorted({"late", "serve", "state"} & set(sys.modules)), getattr(sys.modules.get("state"), "spoilt", None))
"""


@pytest.mark.parametrize(
    ("rehearse", "imported"),
    [
        ("import late, state\n    state.spoilt = True", "['late', 'serve', 'state'] False"),
        ("import late\n    raise ValueError('no')", "[] None"),
        ("import os\n    os.abort()", "[] None"),
    ],
    ids=["works", "fails", "dies"],
)
def test_what_a_start_imports_late_is_seen_in_a_fork_that_is_thrown_away(tmp_path: Path, rehearse: str, imported: str) -> None:
    (tmp_path / "late.py").touch()
    (tmp_path / "state.py").write_text("spoilt = False\n")
    (tmp_path / "serve.py").write_text(f"def rehearse():\n    {rehearse}\n")
    places = os.pathsep.join([str(tmp_path), str(SERVE.parent)])
    command = [sys.executable, "-c", textwrap.dedent(REHEARSAL)]
    done = subprocess.run(command, env={"PYTHONPATH": places}, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == imported


def test_what_is_asked_ahead_is_remembered_and_what_is_not_there_is_said(tmp_path: Path) -> None:
    platform = "class It:\n    major, minor = 9, 0\n    def get_device_capability(self):\n        return self\ncurrent_platform = It()\n"
    modules = {
        "triton/runtime/cache.py": "asked = []\ndef triton_key():\n    asked.append('key')\n",
        "triton/backends/nvidia/compiler.py": "asked = []\ndef get_ptxas_version(arch):\n    asked.append(arch)\n",
        "serve.py": "asked = []\ndef parser():\n    asked.append('parser')\n",
        "vllm/platforms.py": platform,
    }
    for name, body in modules.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    code = "import preloaded, serve, triton.runtime.cache as c, triton.backends.nvidia.compiler as n\n"
    code += "preloaded._ask_ahead(); print(serve.asked, c.asked, n.asked)"
    places = os.pathsep.join([str(tmp_path), str(SERVE.parent)])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": places}, capture_output=True, text=True, timeout=60, check=True)
    told, asked = done.stdout.splitlines()
    assert told.startswith("not asked ahead: triton.backends.nvidia.driver.library_dirs: ModuleNotFoundError")
    assert asked == "['parser'] ['key'] [90]"
