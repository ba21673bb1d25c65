"""What is made to go wrong: `SIM_FAULT` at the start, `POST /sim/fault` later; a comma list of `name` or `name:value`.

die_at_start[:s]   log a traceback and exit 1        oom_at_start    no memory for the weights
hang_at_start      never listen                      slow_start:s    load for so much longer
no_kvcached        plain vLLM: no segment            slow_step:s     seconds for each token
die_after:n        the core dies as by SIGKILL when the n-th request from now (or a later one) makes its 3rd token
hang_after:n       the core stops there instead: no tokens, no RPC answers, /health 200; n = 0 is at once
stall_after:n      no tokens from there on, but the core goes on and answers RPCs; n = 0 is at once
prefill_chunk:n    prompts are computed n tokens a step, one at a time, as with --max-num-batched-tokens
ignore_sigterm     both processes ignore SIGTERM     orphan_core     on SIGTERM the API server is killed, the core stays
error_500          every completion answers 500      wake_oom        wake_up answers 500, out of memory
sleep_500          /sleep answers 500 with the weights gone: the first request after wake_up kills the core
"""

from __future__ import annotations

_WITH_VALUE = {"slow_start", "die_after", "hang_after", "stall_after", "prefill_chunk", "slow_step"}
_VALUE_OPTIONAL = {"die_at_start"}
_WITHOUT_VALUE = {
    "oom_at_start",
    "hang_at_start",
    "no_kvcached",
    "ignore_sigterm",
    "orphan_core",
    "error_500",
    "sleep_500",
    "wake_oom",
}


class Faults(dict[str, float]):
    """The faults in force, by name; a fault without a value has 0."""

    @classmethod
    def parse(cls, text: str) -> Faults:
        faults = cls()
        for part in (part.strip() for part in text.split(",")):
            if not part:
                continue
            name, colon, value = part.partition(":")
            if name not in _WITH_VALUE | _VALUE_OPTIONAL | _WITHOUT_VALUE:
                raise ValueError(f"fault {name!r} is unknown; see orchestrator/engine/simulator/faults.py for the list")
            if (name in _WITH_VALUE and not colon) or (name in _WITHOUT_VALUE and colon):
                raise ValueError(f"fault {part!r}: {name} {'needs' if name in _WITH_VALUE else 'takes no'} value")
            faults[name] = float(value) if colon else 0.0
        return faults
