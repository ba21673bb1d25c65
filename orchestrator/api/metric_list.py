"""Every metric of /metrics: its name, kind, help text and labels. docs/metrics.md, config/grafana and what is served are held to this list.

Names are Prometheus's way: base units, `_total` of what only rises; `gpu` is the index that `status` shows, `model` a registered name.
"""

from typing import NamedTuple

ON_GPU = ("model", "gpu")


class Told(NamedTuple):
    kind: str
    help: str
    labels: tuple[str, ...] = ()


METRICS: dict[str, Told] = {
    "orchestrator_build_info": Told("gauge", "1; what runs here. gpu_source: nvml or simulated.", ("version", "gpu_source")),
    "orchestrator_state_problem": Told("gauge", "1 while the state file can not be written: changes are refused."),
    "orchestrator_loop_seconds": Told("histogram", "What the loop took to decide and to act, for each look."),
    "orchestrator_loop_errors_total": Told("counter", "Looks that failed; the log has the traceback."),
    "orchestrator_loop_age_seconds": Told("gauge", "Since the last whole look."),
    "orchestrator_launch_server_up": Told("gauge", "1 where engines are forked from it, 0 where they start slowly.", ("engine",)),
    "orchestrator_launch_server_resident_bytes": Told("gauge", "Host memory of the launch server.", ("engine",)),
    "orchestrator_launch_server_forks_total": Told("counter", "Engines that it has forked.", ("engine",)),
    "orchestrator_host_sleepers_bytes": Told("gauge", "Host memory of models that sleep, or have slept and keep it."),
    "orchestrator_host_sleepers_limit_bytes": Told("gauge", "What that may become (memory.sleepers)."),
    "orchestrator_gpu_info": Told("gauge", "1; which card it is.", ("gpu", "uuid", "name")),
    "orchestrator_gpu_size_bytes": Told("gauge", "Memory of the card.", ("gpu",)),
    "orchestrator_gpu_memory_bytes": Told(
        "gauge", "The card, divided: reserve, foreign, fixed, kv, claims and room add up to its size; room is below 0 where it lacks.",
        ("gpu", "kind"),
    ),
    "orchestrator_gpu_free_bytes": Told("gauge", "Free memory, as NVML shows it.", ("gpu",)),
    "orchestrator_gpu_pool_bytes": Told("gauge", "What is there for KV: kv and room.", ("gpu",)),
    "orchestrator_gpu_kv_limit_bytes": Told("gauge", "All limits on it together.", ("gpu",)),
    "orchestrator_gpu_reading_age_seconds": Told("gauge", "Since NVML was last read.", ("gpu",)),
    "orchestrator_gpu_reading_error": Told("gauge", "1 while it can not be read: its limits stay as they are.", ("gpu",)),
    "orchestrator_claim_bytes": Told("gauge", "Promised to a model, and not taken yet.", ON_GPU),
    "orchestrator_engine_gpu_bytes": Told("gauge", "What NVML shows for a model's engine.", ON_GPU),
    "orchestrator_kv_limit_bytes": Told("gauge", "The limit of a pool, as it was asked for.", ON_GPU),
    "orchestrator_kv_limit_effective_bytes": Told("gauge", "The limit that its engine has acknowledged.", ON_GPU),
    "orchestrator_kv_target_bytes": Told("gauge", "Where its limit is going.", ON_GPU),
    "orchestrator_kv_used_bytes": Told("gauge", "KV in use.", ON_GPU),
    "orchestrator_kv_prealloc_bytes": Told("gauge", "KV that is mapped ahead of its use.", ON_GPU),
    "orchestrator_kv_floor_bytes": Told("gauge", "What its limit should never be under.", ON_GPU),
    "orchestrator_kv_ceiling_bytes": Told("gauge", "What its limit is never above.", ON_GPU),
    "orchestrator_kv_demand_bytes": Told("gauge", "What it could use now.", ON_GPU),
    "orchestrator_kv_floor_short": Told("gauge", "1 while its floor does not fit beside the others.", ON_GPU),
    "orchestrator_limit_moves_total": Told("counter", "Changes of its limit, by reason.", ("model", "reason")),
    "orchestrator_models": Told("gauge", "How many models are in a state.", ("state",)),
    "orchestrator_model_state": Told("gauge", "1, with the state that a model is in.", ("model", "state")),
    "orchestrator_model_transitions_total": Told("counter", "How often a model came into a state.", ("model", "state")),
    "orchestrator_engine_failures_total": Told("counter", "Engines that failed to start, died or hung.", ("model",)),
    "orchestrator_model_start_seconds": Told("summary", "Starts that became ready, and what they took.", ("model",)),
    "orchestrator_model_sleep_seconds": Told("summary", "Sleeps, and what falling asleep took.", ("model",)),
    "orchestrator_model_wake_seconds": Told("summary", "Wakes, and what they took.", ("model",)),
    "orchestrator_model_expected_seconds": Told("gauge", "What a start, sleep or wake takes: learned, or estimated.", ("model", "move")),
    "orchestrator_requests_running": Told("gauge", "Requests that hold a place.", ("model",)),
    "orchestrator_requests_waiting": Told("gauge", "Requests that wait for their turn or for the model.", ("model",)),
    "orchestrator_longest_wait_seconds": Told("gauge", "How long the one that waits longest has waited; 0: nobody waits.", ("model",)),
    "orchestrator_queue_wait_seconds": Told("histogram", "Waits of requests that had to wait, until their turn came.", ("model",)),
    "orchestrator_requests_total": Told(
        "counter", "Requests that ended, by HTTP status; 101: a WebSocket, 499: its client left first, 502: its engine broke off.",
        ("model", "code"),
    ),
    "orchestrator_errors_total": Told("counter", "Requests that ended with an error of the daemon's own, by its code.", ("model", "code")),
    "orchestrator_request_seconds": Told(
        "histogram", "From the whole request to the end of its answer, waits included; no errors, no WebSockets.", ("model",)
    ),
    "orchestrator_time_to_first_token_seconds": Told("histogram", "From the whole request to the first event of its stream.", ("model",)),
    "orchestrator_tokens_total": Told(
        "counter",
        "Tokens, as engines told them in answers; of streams those with an API key, or that ask for usage; kind: prompt or completion.",
        ("model", "kind"),
    ),
}  # fmt: skip
