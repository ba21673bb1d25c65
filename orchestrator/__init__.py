"""One daemon that shares GPUs between many language models.

The map of the house, top down; each folder may import only what stands below it (tests/test_imports.py holds this):

    daemon.py     composition root: builds each part once, runs the loop and the servers, stops them in order
    settings.py   what an operator may set, from environment, file and default
    api/          HTTP in: /v1/* for users (proxied to engines), /api/v1/* for operators
    control/      RUN: the one loop, observe -> decide -> act -> publish, and what others may talk to
    policy/       DECIDE: pure functions from what was seen to what to do, with a reason
    drivers/      TOUCH: one file = one outside thing (processes, vLLM, NVML, kvcached's segments, SQLite, systemd)
    engine/       INSIDE an engine process: our code beside vLLM, and the simulated engine; imports nothing of the rest
    cli/          orchestratorctl: an HTTP client of api/
    experiments/  orchestratorctl bench: measures from outside, as a client; a plain vLLM beside it
    marked_yaml.py  YAML with the place of every value; journal.py  journald's own protocol
    errors.py     the exception tree; each error knows its HTTP status, its OpenAI code and its exit code
"""

__version__ = "0.1.0"
