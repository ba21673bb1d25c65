"""A model's class is looked at in a fork of this process, which has imported vLLM, and not in a new Python that imports it again.

vLLM does it for the first start of each kind of model on a machine (then it is remembered in its cache folder), and elsewhere than in
the API server, since a class may touch the GPU when it is imported. A fork is as much elsewhere, and takes 0.1 s instead of 10. What
fails there is done as vLLM does it. Checked with vLLM 0.24.0.
"""

import contextlib
import functools
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

LOOK_S = 60  # an import, unless it hangs


def install() -> None:
    try:
        from vllm.model_executor.models import registry

        in_a_new_python = registry._run_in_subprocess
    except (ImportError, AttributeError) as error:
        print(f"models are looked at as vLLM does it: {type(error).__name__}: {error}", flush=True)
        return

    @functools.wraps(in_a_new_python)
    def in_a_fork(look: Callable[[], Any]) -> Any:
        said = _asked_of_a_fork(look)
        return pickle.loads(said) if said else in_a_new_python(look)

    registry._run_in_subprocess = in_a_fork


def _asked_of_a_fork(look: Callable[[], Any]) -> bytes:
    """What it returned, pickled; nothing where it failed."""
    hears, tells = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LOOK_S)
            with open(tells, "wb") as pipe:
                pipe.write(pickle.dumps(look()))
        os._exit(0)
    os.close(tells)
    with open(hears, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said
