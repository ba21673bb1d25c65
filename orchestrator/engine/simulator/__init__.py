"""A simulated engine: processes, HTTP, KV segment and log of `vllm` 0.24 with kvcached 0.1.6, on a simulated GPU.

Start it as vLLM is started: `ENABLE_KVCACHED=true SIM_GPU_DIR=… python -m orchestrator.engine.simulator --model …`.
It needs the standard library, starlette and uvicorn only, and imports nothing of the rest of this package.
What it imitates, it imitates as measured or read in the sources, faults included: a limit that an idle engine ignores,
a request that never runs again after its limit was too small, an EngineCore that outlives its API server.
"""
