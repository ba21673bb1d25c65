"""Pictures of a run: one GPU's memory over time, stacked by what holds it, with each engine's KV use under its limit;
and all grabs of a foreign process laid over each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.box import Sample
from bench.card import Row

GIB = 1 << 30
COLOURS = ("#3b6fb6", "#d1812b", "#4c9a57", "#a94a58", "#7a62a8", "#7d7d7d")


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
