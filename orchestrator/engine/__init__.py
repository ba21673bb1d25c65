"""INSIDE an engine process. Imports nothing of the rest, and only what an engine's own venv holds.

vllm/        run beside real vLLM by the engine venv's python, by path: nothing needs to be installed there
simulator/   a process that speaks and behaves like vLLM + kvcached on a simulated GPU
"""
