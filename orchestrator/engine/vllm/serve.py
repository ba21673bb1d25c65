"""vLLM's OpenAI server with kv_rpc installed: `<engine python> serve.py --model … --uds …`.

vLLM is imported here once and EngineCore is forked from this process (VLLM_WORKER_MULTIPROC_METHOD=fork), so it inherits both
the imports and the installed calls: 24 s to ready instead of 41 s (H200, 0.5B). Where vLLM insists on spawning a process
instead, that process imports this file again as its main module, and install() runs there too.
launch_server.py imports this file ahead of time, and calls main() in each process that it forks: 4 s.
"""

import kv_rpc  # beside this file

kv_rpc.install()


def main() -> None:
    import uvloop
    from vllm.entrypoints.openai import api_server as server

    server.cli_env_setup()
    parser = server.make_arg_parser(server.FlexibleArgumentParser(description="vLLM with kvcached, run by the orchestrator"))
    args = parser.parse_args()
    server.validate_parsed_serve_args(args)
    uvloop.run(server.run_server(args))


if __name__ == "__main__":
    main()
