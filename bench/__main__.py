"""`python -m bench NAME [options]`: run one, print its table, write its results."""

import importlib
import signal
import sys

NAMES = {
    "demo": ("bench.demo", "two models on a simulated GPU: bursts, and how the budgets move (make demo)"),
    "budgets": ("bench.budgets", "the allocator's cost, the loop's share of a core, seconds until a limit is in force; no GPU"),
    "proxy": (
        "bench.proxy.main",
        "CPU of a plain request and a streamed chunk through ours, nginx, the vLLM and SGLang routers, LiteLLM; no GPU",
    ),
    "adoption": ("bench.adoption", "eight engines, their daemon killed and started again: seconds until each is served; no GPU"),
    "chaos": (
        "bench.chaos.main",
        "seeded faults of every kind under load, replayable; invariants checked all the time; no GPU (make chaos)",
    ),
    "soak": ("bench.soak", "steady load for an hour: the slope of the daemon's memory, descriptors, threads and tasks; no GPU"),
    "cli": ("bench.cli", "how long `orchestratorctl ls` takes, with 20 and with 200 models; no GPU"),
    "pictures": ("bench.pictures", "docs/pictures: what `top` and `explain` show of a busy daemon on a simulated GPU"),
    "gpu-first-run": ("bench.gpu.first_run", "two real vLLM engines on one GPU: NVML before, idle, in a burst, after, and gone"),
    "gpu-budgets": ("bench.gpu.budgets", "limits on a GPU: idle memory, grabs by others, starved requests, throughput"),
    "gpu-residency": ("bench.gpu.residency", "cold starts, sleep and wake on a GPU; sixteen models on a card for five, and what is left"),
    "gpu-shared": (
        "bench.gpu.shared",
        "orchestratorctl bench single and shared on a GPU: memory and latency beside plain vLLM engines with static pools",
    ),
    "gpu-survive": ("bench.gpu.survive", "two real engines under load: daemon, server, core … killed or stopped: who heals, and when"),
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print("usage: python -m bench NAME [--help]\n")
        for name, (_, about) in NAMES.items():
            print(f"  {name:15} {about}")
        return 0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemon and its engines are ended, as after Ctrl-C
    module = importlib.import_module(NAMES[sys.argv[1]][0])
    return int(module.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
