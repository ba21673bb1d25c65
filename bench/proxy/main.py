"""proxy: what a proxy costs, ours and others', side by side: CPU of the whole process for a plain request and for a streamed chunk.

A mock engine (raw asyncio, answers made beforehand), a raw client on another core, one proxy at a time pinned to a core, in rounds in
turns. CPU is what the kernel counts for the proxy's processes (/proc/PID/task/*/schedstat), so a busy machine spoils it less than time.
Ours is the whole daemon with its loop running.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import results
from bench.box import ROOT
from bench.proxy.rivals import MODEL, OTHER_CORE, Arm, Engines, Start, folder, found

PLAIN_S, WARM_S = 4.0, 1.0
TOGETHER = (1, 64)
STREAMS = 128
MANY = 1000
MIB = 1 << 20
SLOW = frozenset({"litellm"})  # 128 streams at its speed would take minutes


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench proxy", description=__doc__)
    parser.add_argument("--rivals", type=Path, help="bin folder of a venv with vllm-router, sglang-router and litellm")
    parser.add_argument("--controller", type=Path, help="controller/frontend.py of a kvcached checkout")
    parser.add_argument("--arms", help="only these, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    arms, missing = found(options.rivals, options.controller)
    if options.arms:
        arms = {name: arms[name] for name in options.arms.split(",")}
    took: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    bad: dict[str, list[str]] = {}
    figures: dict[str, float] = {}
    with folder() as here:
        engines = Engines(here)
        with engines.running():
            for number in range(options.rounds):
                for name, start in arms.items():
                    if name in SLOW and number:
                        continue
                    measured = _round(name, start, engines, here, bad)
                    for key, value in measured.items():
                        took[name].setdefault(key, []).append(value)
                    print(f"round {number + 1} {name:20}", "  ".join(f"{key} {value:.1f}" for key, value in measured.items()), flush=True)
            if "ours" in arms:
                figures |= _many(arms["ours"], engines, here, bad)
    for name, several in took.items():
        for key, values in several.items():
            figures[f"{name}_{key}"] = statistics.median(values)
    if "ours_ttft_p99_ms" in figures and "nginx_ttft_p99_ms" in figures:
        figures["ttft_p99_over_nginx"] = statistics.median(
            ours / theirs for ours, theirs in zip(took["ours"]["ttft_p99_ms"], took["nginx"]["ttft_p99_ms"], strict=True)
        )
    notes: dict[str, Any] = {"rounds": options.rounds, "streams": STREAMS, "left_out": missing, "bad": bad, "cores": os.cpu_count()}
    notes["load_average"] = os.getloadavg()
    path = results.write("proxy", results.typed("proxy", argv), figures, notes, "none", folder=options.out)
    _plot(figures, list(arms), options.out / "proxy.png")
    _table(figures, list(arms))
    print(path)
    return 1 if bad.get("ours") else 0


def _round(name: str, start: Start, engines: Engines, here: Path, bad: dict[str, list[str]]) -> dict[str, float]:
    measured = {}
    with start(engines, here) as arm:
        _load(arm, "--plain", str(WARM_S), "--connections", str(TOGETHER[-1]))
        for together in TOGETHER:
            before, kernel = _cpu_s(arm), _kernel_s(arm)
            done = _load(arm, "--plain", str(PLAIN_S), "--connections", str(together))
            measured[f"request_{together}_us"] = (_cpu_s(arm) - before) / max(1, done["requests"]) * 1e6
            measured[f"request_{together}_kernel_us"] = (_kernel_s(arm) - kernel) / max(1, done["requests"]) * 1e6
            measured[f"requests_{together}_s"] = done["requests"] / done["seconds"]
            _note(bad, name, done)
        measured["request_us"] = measured[f"request_{TOGETHER[-1]}_us"]
        before, kernel = _cpu_s(arm), _kernel_s(arm)
        done = _load(arm, "--streams", str(STREAMS), "--rounds", "1" if name in SLOW else "2")
        if done["chunks"]:  # none where it changes the events so that they cannot be told from each other
            measured["chunk_us"] = (_cpu_s(arm) - before) / done["chunks"] * 1e6
            measured["chunk_kernel_us"] = (_kernel_s(arm) - kernel) / done["chunks"] * 1e6
        measured["ttft_p50_ms"], measured["ttft_p99_ms"] = done["p50_s"] * 1000, done["p99_s"] * 1000
        _note(bad, name, done)
    return measured


def _many(start: Start, engines: Engines, here: Path, bad: dict[str, list[str]]) -> dict[str, float]:
    """A thousand streams at once through ours: is each whole and in order, and what does the daemon hold for each."""
    with start(engines, here) as arm:
        _load(arm, "--streams", str(STREAMS))
        before = _rss(arm)
        most = before
        with _loading(arm, "--streams", str(MANY)) as process:
            while process.poll() is None:
                most = max(most, _rss(arm))
                time.sleep(0.05)
            done = json.loads(process.communicate()[0])
        _note(bad, "ours", done)
        held = (most - before) / MANY / 1024
        with _loading(arm, "--stalled", "64"):
            time.sleep(0.5)
            filled = _rss(arm)
            time.sleep(4)
            grown = _rss(arm) - filled
    return {
        "ours_1000_streams_chunks": done["chunks"],
        "ours_1000_streams_bad": done["bad"],
        "ours_stream_kib": held,
        "ours_stalled_growth_kib": grown / 1024,
    }


def _load(arm: Arm, *words: str) -> dict[str, Any]:
    with _loading(arm, *words) as process:
        out, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the client failed: {error[-2000:]}")
    return dict(json.loads(out))


@contextlib.contextmanager
def _loading(arm: Arm, *words: str) -> Any:
    headers = [word for header in arm.headers for word in ("--header", header)]
    command = ["taskset", "-c", OTHER_CORE, sys.executable, "-m", "bench.proxy.load", "--port", str(arm.port), "--model", MODEL]
    process = subprocess.Popen([*command, *words, *headers], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def _note(bad: dict[str, list[str]], name: str, done: dict[str, Any]) -> None:
    if done["bad"]:
        bad.setdefault(name, []).extend(done["why"])


def _processes(pid: int) -> list[int]:
    found = [pid]
    for known in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{known}/task"):
                found += map(int, Path(f"/proc/{known}/task/{task}/children").read_text().split())
    return found


def _cpu_s(arm: Arm) -> float:
    """Of the arm's processes; of ours without the engines, which have a core of their own."""
    total = 0
    if arm.pid is None:
        return 0.0
    for pid in _processes(arm.pid) if not _is_ours(arm.pid) else [arm.pid]:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9


def _kernel_s(arm: Arm) -> float:
    """What of that is spent inside the kernel: reading, writing, waiting for connections. In ticks of 10 ms."""
    if arm.pid is None:
        return 0.0
    ticks = 0
    for pid in _processes(arm.pid) if not _is_ours(arm.pid) else [arm.pid]:
        with contextlib.suppress(OSError):
            ticks += int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _is_ours(pid: int) -> bool:
    return b"orchestrator.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _rss(arm: Arm) -> int:
    assert arm.pid is not None
    return int(Path(f"/proc/{arm.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _table(figures: dict[str, float], arms: list[str]) -> None:
    print(f"\n{'':22}{'us/request c=1':>16}{'c=64':>10}{'us/chunk':>10}{'TTFT p50 ms':>14}{'p99 ms':>10}")
    for name in arms:
        row = [
            figures.get(f"{name}_{key}", float("nan"))
            for key in ("request_1_us", "request_64_us", "chunk_us", "ttft_p50_ms", "ttft_p99_ms")
        ]
        print(f"{name:22}{row[0]:16.1f}{row[1]:10.1f}{row[2]:10.1f}{row[3]:14.1f}{row[4]:10.1f}")
    for key in ("ttft_p99_over_nginx", "ours_1000_streams_chunks", "ours_1000_streams_bad", "ours_stream_kib", "ours_stalled_growth_kib"):
        if key in figures:
            print(f"{key:30} {figures[key]:12.2f}")


def _plot(figures: dict[str, float], arms: list[str], path: Path) -> None:
    names = [name for name in arms if name != "direct"]
    kinds = (("request_us", "CPU a plain request, µs (64 connections)"), ("chunk_us", "CPU a streamed chunk, µs (128 streams)"))
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.5 * len(names) + 1.6))
    for axis, (key, title) in zip(axes, kinds, strict=True):
        shown = [name for name in names if f"{name}_{key}" in figures]
        values = [figures[f"{name}_{key}"] for name in shown]
        colours = ["#3b6fb6" if name == "ours" else "#b9c3cf" for name in shown]
        bars = axis.barh([name.replace("_", " ") for name in shown], values, color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        if max(values) > 20 * min(values):
            axis.set_xscale("log")
            axis.set_xlim(min(values) / 3, max(values) * 3)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
