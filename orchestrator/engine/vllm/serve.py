"""vLLM's OpenAI server with our changes installed: `<engine python> serve.py --model … --uds …`.

vLLM is imported here once and EngineCore is forked from this process (VLLM_WORKER_MULTIPROC_METHOD=fork), so it inherits both
the imports and what was installed. Where vLLM insists on spawning a process instead (the workers of tensor parallelism), that
process imports this file again as its main module, and kv_rpc is installed there too.
ENGINE_PLAIN_START=1 (of an engine venv, or of one model) leaves out all of them but kv_rpc: vLLM then starts as it always does.

launch_server.py imports this file ahead of time, and calls main() in each process that it forks. From the request to the first token
(H200, 0.5B, eager, through the daemon): 12.2 s executed, 1.5 s forked; 15.9 and 4.9 s before the changes beside kv_rpc.
"""

import functools
import os
from typing import Any

import inspection  # beside this file
import kv_blocks
import kv_rpc
import overlap
import tokenizer_copies

kv_rpc.install()
if __name__ != "__mp_main__" and os.environ.get("ENGINE_PLAIN_START") != "1":  # a worker would import vLLM's API server for them
    for part in (kv_blocks, overlap, tokenizer_copies, inspection):
        part.install()


def main() -> None:
    import uvloop
    from vllm.entrypoints.openai import api_server as server

    server.cli_env_setup()
    args = parser().parse_args()
    server.validate_parsed_serve_args(args)
    uvloop.run(server.run_server(args))


@functools.cache
def parser() -> Any:
    """Made ahead of time where engines are forked: it has 300 arguments."""
    from vllm.entrypoints.openai import api_server as server

    return server.make_arg_parser(server.FlexibleArgumentParser(description="vLLM with kvcached, run by the orchestrator"))


def rehearse() -> None:
    """All of a start that needs no model and no GPU: it imports what is imported late, and leaves the process fit for nothing else."""
    import uvicorn
    from vllm.entrypoints.openai import api_server as server

    args = parser().parse_args(["--model", "none"])
    uvicorn.Config(server.build_app(args, ("generate",)), log_config=None).load()


if __name__ == "__main__":
    main()
