"""What is kept of an experiment: result.json (figures and all that explains them), samples.csv, and the table that people read."""

import csv
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.experiments.house import House
from orchestrator.experiments.record import Arm, Record
from orchestrator.experiments.samples import Sample
from orchestrator.policy.units import MIB

SIMULATED = "SIMULATED GPU: this shows how it works, its figures say nothing of a real one"
Json = dict[str, Any]


def head(experiment: str, command: str, house: House, settings: Mapping[str, Any]) -> Json:
    """What every result begins with."""
    return {
        "experiment": experiment,
        "simulated": house.simulated,
        "warning": SIMULATED if house.simulated else None,
        "complete": False,
        "why": None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "models": {name: house.before[name]["source"] for name in house.names},
        "gpus": [{key: gpu[key] for key in ("index", "uuid", "name", "total_bytes")} for gpu in house.gpus],
        "versions": house.versions(),
        "settings": dict(settings),
    }


def title(result: Mapping[str, Any]) -> str:
    """One line under a picture: GPU, versions, date."""
    names = ", ".join(dict.fromkeys(str(gpu["name"]) for gpu in result["gpus"]))
    versions = ", ".join(f"{name} {version}" if version else name for name, version in result["versions"].items())
    return f"{names} · {versions} · {str(result['date'])[:10]}"


def write_result(result: Mapping[str, Any], folder: Path) -> Path:
    """Raises OSError."""
    path = folder / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def write_samples(samples: Sequence[Sample], arms: Sequence[Arm], folder: Path) -> Path:
    """A row a look, MiB; `arm` is empty between the arms. Raises OSError."""
    path = folder / "samples.csv"
    models = sorted({name for sample in samples for name in sample.models})
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "second",
                "arm",
                "used_mib",
                "foreign_mib",
                *(f"{name}_{part}" for name in models for part in ("fixed_mib", "kv_mib", "state")),
            ]
        )
        for sample in samples:
            row: list[object] = [f"{sample.at_s:.2f}", _arm_at(sample.at_s, arms), sample.used_bytes // MIB]
            row.append("" if sample.foreign_bytes is None else sample.foreign_bytes // MIB)
            for name in models:
                held = sample.models.get(name)
                row += ["", "", ""] if held is None else [held.fixed_bytes // MIB, held.kv_bytes // MIB, held.state]
            rows.writerow(row)
    return path


def _arm_at(second: float, arms: Sequence[Arm]) -> str:
    return next((arm.name for arm in arms if arm.began_s <= second and (arm.ended_s is None or second <= arm.ended_s)), "")


def arms_of(record: Record) -> list[Json]:
    """The arms as JSON: windows, bursts and each request's fate."""
    return [
        {
            "arm": arm.name,
            "round": arm.round,
            "began_s": round(arm.began_s, 2),
            "ended_s": None if arm.ended_s is None else round(arm.ended_s, 2),
            "bursts": [
                {
                    "model": model,
                    "began_s": round(begin, 2),
                    "ended_s": round(end, 2),
                    "answers": [
                        {
                            "ttft_s": answer.first_s,
                            "total_s": answer.total_s,
                            "tokens": answer.tokens,
                            "error": answer.error,
                            "code": answer.code,
                        }
                        for answer in answers
                    ],
                }
                for (model, begin, end), answers in zip(arm.bursts, arm.answers, strict=False)
            ],
        }
        for arm in record.arms
    ]


# ---- for people ---------------------------------------------------------------------------------------------------------

ROWS = (
    ("idle", "idle_mib", "MiB"), ("peak", "peak_mib", "MiB"), ("flex", "flex_mib", "MiB"), ("end", "end_mib", "MiB"),
    ("latency p50", "latency_p50_s", "s"), ("latency p95", "latency_p95_s", "s"), ("first token p50", "ttft_p50_s", "s"),
    ("tokens/s", "tokens_per_s", ""), ("requests", "requests", ""), ("failed", "failed", ""),
)  # fmt: skip


def compared(figures: Mapping[str, float]) -> list[list[str]]:
    """Rows: what, daemon, static, and the first through the second. `-` where it was not measured."""
    rows = []
    for what, key, unit in ROWS:
        ours, static = figures.get(f"daemon_{key}"), figures.get(f"static_{key}")
        if ours is None and static is None:
            continue
        ratio = f"{ours / static:.2f}" if ours is not None and static and key not in ("requests", "failed") else "-"
        rows.append([what, shown(ours, unit), shown(static, unit), ratio])
    return rows


def told(figures: Mapping[str, float]) -> list[str]:
    """What the comparison comes to, in sentences."""
    lines = []
    if "idle_saving_vs_static" in figures:
        saved = figures["idle_saved_mib"] / 1024
        lines.append(
            f"idle, the daemon's engines hold {figures['idle_saving_vs_static']:.0%} less of the GPU than static ones: {saved:.1f}GiB"
        )
    if "latency_ratio" in figures:
        lines.append(f"the median request takes {figures['latency_ratio']:.2f} times as long as on a plain vLLM")
    return lines


def of_mix(figures: Mapping[str, float], models: Sequence[str]) -> list[list[str]]:
    """Rows: model, requests, percentiles, goodput; the last one of all."""
    keys = (("requests", ""), ("ttft_p50_s", "s"), ("ttft_p99_s", "s"), ("tpot_p50_s", "s"), ("latency_p50_s", "s"), ("latency_p99_s", "s"))
    rows = []
    for name, prefix in [*((model, f"{model}_") for model in models), ("all", "")]:
        cells = [shown(figures.get(f"{prefix}{key}"), unit) for key, unit in keys]
        goodput = figures.get(f"{prefix}goodput")
        rows.append([name, *cells, "-" if goodput is None else f"{goodput:.1%}"])
    return rows


def shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "MiB" or value == int(value):
        return f"{value:.0f}{unit}"
    return f"{value:.3f}{unit}" if unit == "s" and value < 10 else f"{value:.1f}{unit}"
