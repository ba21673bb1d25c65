"""Pictures of a run: one GPU's memory over time, stacked by what holds it, with each engine's KV use under its limit; all grabs of a
foreign process laid over each other; and what state each of many models was in, above the memory and how long requests waited."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.box import Sample
from bench.card import Row

GIB = 1 << 30
COLOURS = ("#3b6fb6", "#d1812b", "#4c9a57", "#a94a58", "#7a62a8", "#7d7d7d")
STATES = {
    "ready": "#4c9a57",
    "draining": "#a9cfae",
    "asleep": "#8fb3dd",
    "waking": "#3b6fb6",
    "starting": "#d1812b",
    "waiting": "#f0d9a8",
    "stopping": "#b9a7c9",
    "backoff": "#a94a58",
    "failed": "#5c1020",
}  # stopped: nothing
Wait = tuple[str, float, float, bool]  # model, second of the request, seconds until its first token, whether it was answered


def memory_over_time(samples: Sequence[Sample], models: Sequence[str], events: Sequence[tuple[float, str]], title: str, path: Path) -> None:
    """Top: the card. Below, one panel a model: KV mapped (area) and its limit (line). `events`: (second, text) marks."""
    if not samples:
        raise ValueError("no samples: the run was shorter than one sample")
    at = [s.at_s for s in samples]
    figure, axes = plt.subplots(
        1 + len(models),
        1,
        figsize=(11, 3.4 + 2.0 * len(models)),
        sharex=True,
        height_ratios=[1.6] + [1.0] * len(models),
        layout="constrained",
    )
    card = axes[0]
    foreign = [_gpu(s, "foreign_bytes") for s in samples]
    fixed = [[max(0.0, _engine(s, m) - _mapped(s, m)) for s in samples] for m in models]
    kv = [[_mapped(s, m) for s in samples] for m in models]
    layers, labels, colours = [foreign], ["not ours"], ["#c9c9c9"]
    for index, model in enumerate(models):
        layers += [fixed[index], kv[index]]
        labels += [f"{model}: weights, context", f"{model}: KV"]
        colours += [_pale(COLOURS[index % len(COLOURS)]), COLOURS[index % len(COLOURS)]]
    card.stackplot(at, layers, labels=labels, colors=colours, linewidth=0)
    total = _gpu(samples[-1], "total_bytes")
    reserve = _gpu(samples[-1], "reserve_bytes")
    card.axhline(total, color="#222222", linewidth=1)
    card.axhline(total - reserve, color="#222222", linewidth=0.8, linestyle="--")
    card.text(at[-1], total - reserve, "reserve above this line ", ha="right", va="top", fontsize=8, color="#444444", clip_on=True)
    card.set_ylabel(f"GPU memory, GiB\nof {total:.0f}")
    peak = max(_gpu(s, "used_bytes") for s in samples)
    card.set_ylim(0, total * 1.03 if peak > total / 3 else peak * 1.5)  # a card that is hardly used: look at what is
    card.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    card.set_title(title, loc="left", fontsize=11, pad=44)
    for panel, (index, model) in zip(axes[1:], enumerate(models), strict=True):
        colour = COLOURS[index % len(COLOURS)]
        panel.fill_between(at, kv[index], color=colour, alpha=0.55, linewidth=0, label="mapped")
        panel.plot(
            at, [_pool(s, model, "limit_bytes") for s in samples], color=colour, linewidth=1.6, label="limit", drawstyle="steps-post"
        )
        panel.set_ylabel(f"{model}\nKV, GiB")
        panel.set_ylim(bottom=0)
        panel.legend(loc="upper left", fontsize=8, frameon=False, ncols=2)
    for second, text in events:
        for panel in axes:
            panel.axvline(second, color="#999999", linewidth=0.7, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "rotation": 30, "ha": "left", "va": "bottom"}
        card.annotate(text, (second, 1.0), fontsize=7, color="#444444", **place)
    axes[-1].set_xlabel("seconds")
    for panel in axes:
        panel.grid(axis="y", linewidth=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _gpu(sample: Sample, key: str) -> float:
    return float(sum(gpu[key] for gpu in sample.status["gpus"])) / GIB


def _model(sample: Sample, model: str) -> Any:
    return sample.models.get(model) or {}


def _engine(sample: Sample, model: str) -> float:
    return float((_model(sample, model).get("engine") or {}).get("gpu_bytes", 0)) / GIB


def _pool(sample: Sample, model: str, key: str) -> float:
    return float((_model(sample, model).get("pool") or {}).get(key, 0)) / GIB


def _mapped(sample: Sample, model: str) -> float:
    return _pool(sample, model, "used_bytes") + _pool(sample, model, "prealloc_bytes")


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * 0.6):02x}" for part in (red, green, blue))


def grabs(rows: Sequence[Row], taken: Sequence[float], before_s: float, after_s: float, title: str, path: Path) -> None:
    """All grabs laid over each other: what the limits may be together (P), and what they are. Zero is when the memory was gone."""
    figure, axes = plt.subplots(1, 1, figsize=(9, 4.2), layout="constrained")
    for index, at in enumerate(taken):
        near = [row for row in rows if -before_s <= row.at - at <= after_s]
        seconds = [row.at - at for row in near]
        labels = ("pool memory P", "limits together", "KV mapped") if index == 0 else (None, None, None)
        axes.plot(seconds, [row.pool / GIB for row in near], color="#222222", linewidth=0.7, alpha=0.6, label=labels[0])
        axes.step(seconds, [row.limit / GIB for row in near], where="post", color=COLOURS[0], linewidth=0.9, alpha=0.6, label=labels[1])
        mapped = [sum(size or 0 for size in row.mapped.values()) / GIB for row in near]
        axes.plot(seconds, mapped, color=COLOURS[2], linewidth=0.7, alpha=0.6, label=labels[2])
    axes.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("seconds after the foreign process had its memory")
    axes.set_ylabel("GiB")
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def residency(
    samples: Sequence[Sample],
    models: Sequence[tuple[str, str]],
    waits: Sequence[Wait],
    events: Sequence[tuple[float, str]],
    title: str,
    path: Path,
) -> None:
    """Top: a row a model (name, shape), coloured by its state. Then the card, and how long each request waited."""
    if not samples:
        raise ValueError("no samples: the run was shorter than one sample")
    height = 1.6 + 0.26 * len(models)
    figure, axes = plt.subplots(3, 1, figsize=(12, height + 4.8), sharex=True, height_ratios=[height, 2.2, 2.2], layout="constrained")
    _states(axes[0], samples, models)
    _card(axes[1], samples)
    _waits(axes[2], waits)
    axes[0].set_title(title, loc="left", fontsize=11, pad=44)
    for second, text in events:
        for panel in axes:
            panel.axvline(second, color="#999999", linewidth=0.7, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "rotation": 30, "ha": "left", "va": "bottom"}
        axes[0].annotate(text, (second, 1.0), fontsize=8, color="#444444", **place)
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(samples[0].at_s, samples[-1].at_s)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _states(panel: Any, samples: Sequence[Sample], models: Sequence[tuple[str, str]]) -> None:
    seen = set()
    for row, (name, _) in enumerate(models):
        for state, start, end in _spans(samples, name):
            if state in STATES:
                seen.add(state)
                panel.barh(row, end - start, left=start, height=0.78, color=STATES[state], linewidth=0)
    panel.set_yticks(range(len(models)), [f"{name}  {shape}" for name, shape in models], fontsize=8)
    panel.set_ylim(len(models) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", linewidth=0.3)
    patches = [Patch(color=colour, label=state) for state, colour in STATES.items() if state in seen]
    panel.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, title="white: stopped")


def _spans(samples: Sequence[Sample], model: str) -> list[tuple[str, float, float]]:
    """State, from when, until when."""
    spans: list[tuple[str, float, float]] = []
    for sample, following in zip(samples, [*samples[1:], samples[-1]], strict=True):
        state = str(_model(sample, model).get("state", "stopped"))
        if spans and spans[-1][0] == state:
            spans[-1] = (state, spans[-1][1], following.at_s)
        else:
            spans.append((state, sample.at_s, following.at_s))
    return spans


def _card(panel: Any, samples: Sequence[Sample]) -> None:
    at = [s.at_s for s in samples]
    layers = {
        "not ours": ("#c9c9c9", "foreign_bytes"),
        "weights, contexts": (_pale(COLOURS[0]), "fixed_bytes"),
        "KV": (COLOURS[0], "kv_used_bytes"),
        "promised to starts, wakes": ("#f0d9a8", "claims_bytes"),
    }
    values = [[max(0.0, _gpu(s, key)) for s in samples] for _, key in layers.values()]
    layers["KV limits above use"] = ("#ececf4", "kv_limit_bytes")
    values.append([max(0.0, _gpu(s, "kv_limit_bytes") - _gpu(s, "kv_used_bytes")) for s in samples])
    panel.stackplot(at, values, labels=list(layers), colors=[colour for colour, _ in layers.values()], linewidth=0)
    total, reserve = _gpu(samples[-1], "total_bytes"), _gpu(samples[-1], "reserve_bytes")
    panel.axhline(total, color="#222222", linewidth=1)
    panel.axhline(total - reserve, color="#222222", linewidth=0.8, linestyle="--", label="reserve above")
    quiet = sorted(values[0])[len(at) // 2]  # what the ballast held all the time says nothing: look at what moved
    panel.set_ylim(max(0.0, quiet - 0.15 * (total - quiet)), total * 1.01)
    panel.set_ylabel("GPU memory, GiB")
    panel.grid(axis="y", linewidth=0.3)
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _waits(panel: Any, waits: Sequence[Wait]) -> None:
    answered = [(at, wait) for _, at, wait, good in waits if good]
    others = [(at, wait) for _, at, wait, good in waits if not good]
    panel.scatter([at for at, _ in answered], [max(0.01, wait) for _, wait in answered], s=9, color=COLOURS[0], linewidths=0, alpha=0.7)
    panel.scatter([at for at, _ in others], [max(0.01, wait) for _, wait in others], s=28, color=COLOURS[3], marker="x")
    panel.set_yscale("log")
    panel.set_ylim(0.01, max([10.0, *(2 * wait for _, _, wait, _ in waits)]))
    panel.set_ylabel("until the first\ntoken, seconds")
    panel.grid(axis="y", linewidth=0.3)
    dots = [
        Line2D([], [], color=COLOURS[0], marker="o", linestyle="", markersize=4, label="answered"),
        Line2D([], [], color=COLOURS[3], marker="x", linestyle="", label="refused, failed"),
    ]
    panel.legend(handles=dots if others else dots[:1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
