"""Pictures of an experiment. The only file that knows matplotlib, which is an extra (`gpu-orchestrator[bench]`): ImportError without it.

Each says whose GPU it was, which versions and when, and in big letters where the GPU was a simulated one.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from orchestrator.experiments import report
from orchestrator.experiments.answers import Answer
from orchestrator.experiments.mix import Outcome
from orchestrator.experiments.record import Arm, Record
from orchestrator.experiments.samples import Held, Sample
from orchestrator.policy.units import GIB

COLOURS = ("#3b6fb6", "#d1812b", "#4c9a57", "#a94a58", "#7a62a8", "#7d7d7d", "#2a9d9d", "#b59b2d")
OF_ARM = {"daemon": "#3b6fb6", "static": "#d1812b"}
SAID = {"daemon": "through the daemon", "static": "plain vLLM, static pool"}
AROUND = 4  # looks before and after
DECADES = 30  # times the least: then most of a linear axis is empty
SMALL = 3  # times less than the largest
TITLE_IN, UNDER_IN = 11.5, 15.5  # characters an inch, at sizes 11 and 8
NARROW = 16  # characters of a model's name below its box
MUCH = 8  # models that get a colour and a line of the legend of their own


def of_bursts(record: Record, result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Memory over time and latencies of both arms; where several models take part, their memory one above the other too."""
    names = list(result["models"])
    made = [_memory(record, result, folder / "vram.png"), _latency(record, names, result, folder / "latency.png")]
    if len(names) > 1:
        made.append(_by_model(record, names, result, folder / "vram-by-model.png"))
    return made


def of_mix(outcome: Outcome, record: Record, result: Mapping[str, Any], folder: Path) -> list[Path]:
    names = list(result["models"])
    made = [_distributions(outcome, names, result, folder / "latency.png"), _goodput(result, names, folder / "goodput.png")]
    samples = record.window(outcome.window)
    if samples:
        figure, panel = plt.subplots(figsize=(11, 4.2), layout="constrained")
        _stack(panel, samples, names, samples[0].at_s)
        panel.set_xlabel("seconds")
        made.append(_save(figure, result, "GPU memory by model", folder / "vram.png"))
    return made


def _memory(record: Record, result: Mapping[str, Any], path: Path) -> Path:
    """Zero is the first burst, for each arm and round: so both are on the same axes. What is too small there is shown once more."""
    spans = [(arm, span) for arm in record.arms if (span := _span(arm)) is not None]
    most: dict[str, float] = {}
    for arm, span in spans:
        most[arm.name] = max(most.get(arm.name, 0.0), *(s.used_bytes / GIB for s in record.window(span)), 0.0)
    top = max(most.values(), default=1.0)
    small = [name for name, value in most.items() if value < top / SMALL]
    count = 1 + len(small)
    figure, panels = plt.subplots(count, 1, figsize=(11, 1.6 + 3.0 * count), sharex=True, squeeze=False, layout="constrained")
    for panel, only in zip(panels[:, 0], [None, *small], strict=True):
        for arm, span in spans:
            if only in (None, arm.name):
                _used(panel, record.window(span), arm, span)
        if record.empty_bytes:
            panel.axhline(min(record.empty_bytes) / GIB, color="#777777", linewidth=0.9, linestyle="--", label="the GPU without either")
        panel.set_ylim(0, 1.08 * (top if only is None else most[only]))
        panel.set_ylabel("GPU memory in use, GiB")
        if only is not None:
            panel.set_title(f"{SAID[only]}, enlarged", loc="left", fontsize=9)
    lines, labels = panels[0, 0].get_legend_handles_labels()
    once = dict(zip(labels, lines, strict=True))  # a round more is no line more
    panels[0, 0].legend(once.values(), once.keys(), fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[-1, 0].set_xlabel("seconds after the first burst began (grey: bursts through the daemon)")
    return _save(figure, result, "GPU memory in use", path)


def _used(panel: Any, samples: Sequence[Sample], arm: Arm, span: tuple[float, float]) -> None:
    zero = arm.bursts[0][1] if arm.bursts else span[0]
    used = [sample.used_bytes / GIB for sample in samples]
    panel.plot([sample.at_s - zero for sample in samples], used, color=OF_ARM[arm.name], linewidth=1.6, label=SAID[arm.name])
    if arm.name == "daemon" and arm.round == 0:
        for _, begin, end in arm.bursts:
            panel.axvspan(begin - zero, end - zero, color="#000000", alpha=0.06, linewidth=0)


def _latency(record: Record, names: Sequence[str], result: Mapping[str, Any], path: Path) -> Path:
    boxes, labels, colours = [], [], []
    for name in names:
        for arm in ("daemon", "static"):
            values = [a.total_s for one in record.of(arm) for burst in one.answers for a in burst if a.model == name and a.error is None]
            if values:
                boxes.append(values)
                labels.append(f"{_narrow(name)}\n{'daemon' if arm == 'daemon' else 'static'}")
                colours.append(OF_ARM[arm])
    figure, panel = plt.subplots(figsize=(max(5.0, 1.6 + 1.5 * len(boxes)), 4.6), layout="constrained")
    if boxes:
        drawn = panel.boxplot(boxes, tick_labels=labels, patch_artist=True, widths=0.55, medianprops={"color": "#111111"})
        for box, colour in zip(drawn["boxes"], colours, strict=True):
            box.set(facecolor=colour, alpha=0.55)
        panel.set_ylim(0, 1.08 * max(map(max, boxes)))
    panel.set_ylabel("seconds a request")
    return _save(figure, result, "Latency", path)


def _by_model(record: Record, names: Sequence[str], result: Mapping[str, Any], path: Path) -> Path:
    """A panel an arm, on one scale; what is too small on it to be seen is shown once more, enlarged."""
    arms = [arm for arm in record.arms if arm.round == 0 and _span(arm) is not None]
    most = {arm.name: max((s.used_bytes for s in record.window(_span(arm))), default=GIB) / GIB for arm in arms}
    top = max(most.values(), default=1.0)
    shown = [(arm, top, SAID[arm.name]) for arm in arms]
    shown += [(arm, most[arm.name], f"{SAID[arm.name]}, enlarged") for arm in arms if most[arm.name] < top / SMALL]
    count = max(1, len(shown))
    figure, panels = plt.subplots(count, 1, figsize=(11, 3.0 * count), sharex=True, squeeze=False, layout="constrained")
    for panel, (arm, ceiling, what) in zip(panels[:, 0], shown, strict=False):
        _stack(panel, record.window(_span(arm)), names, arm.bursts[0][1] if arm.bursts else arm.began_s)
        panel.set_title(what, loc="left", fontsize=9)
        panel.axvline(0, color="#999999", linewidth=0.7, linestyle=":")
        panel.set_ylim(0, 1.08 * ceiling)
    panels[-1, 0].set_xlabel("seconds after the first burst began")
    return _save(figure, result, "GPU memory by model", path)


def _stack(panel: Any, samples: Sequence[Sample], names: Sequence[str], zero: float) -> None:
    """What the GPU shows beyond the models lies at the bottom: the driver's, and others'."""
    if not samples:
        return
    at = [sample.at_s - zero for sample in samples]
    layers, labels, colours, rest = [], [], [], [float(sample.used_bytes) for sample in samples]
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        fixed, kv = _parts([sample.models.get(name) for sample in samples])
        rest = [max(0.0, left - a - b) for left, a, b in zip(rest, fixed, kv, strict=True)]
        static = any(held.state == "static" for s in samples if (held := s.models.get(name)))
        layers += [fixed, kv]
        labels += [f"{name}: all of it" if static else f"{name}: weights, context", "_" if static else f"{name}: KV"]
        colours += [colour if static else _pale(colour), colour]
    scaled = [[value / GIB for value in layer] for layer in [rest, *layers]]
    panel.stackplot(at, scaled, labels=["others, the driver", *labels], colors=["#c9c9c9", *colours], linewidth=0)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("GPU memory, GiB")
    if len(names) <= MUCH:
        panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _parts(looks: Sequence[Held | None]) -> tuple[list[float], list[float]]:
    """What is fixed, and KV. A look at KV is older than the one at the whole, so what is fixed is taken from the looks around it."""
    whole = [float(held.fixed_bytes + held.kv_bytes) if held else 0.0 for held in looks]
    told = [float(held.fixed_bytes) if held else 0.0 for held in looks]
    around = [sorted(told[max(0, at - AROUND) : at + AROUND + 1]) for at in range(len(told))]
    fixed = [min(near[len(near) // 2], most) for near, most in zip(around, whole, strict=True)]
    return fixed, [most - part for most, part in zip(whole, fixed, strict=True)]


def _distributions(outcome: Outcome, names: Sequence[str], result: Mapping[str, Any], path: Path) -> Path:
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4), sharey=True, layout="constrained")
    good = [answer for answer in outcome.answers if answer.error is None]
    for panel, (what, seconds) in zip(panels, _KINDS.items(), strict=True):
        for index, name in enumerate([*names[:MUCH], None]):
            values = sorted(v for answer in good if name in (None, answer.model) and (v := seconds(answer)) is not None)
            colour, width = ("#111111", 2.2) if name is None else (COLOURS[index % len(COLOURS)], 1.2)
            shares = [(rank + 1) / len(values) for rank in range(len(values))]
            panel.step(values, shares, where="post", color=colour, linewidth=width, label=name or "all")
        _by_decades(panel, [value for answer in good if (value := seconds(answer))])
        panel.set_xlabel(f"{what}, seconds")
    panels[0].set_ylabel("part of the answered requests")
    panels[0].set_ylim(0, 1.02)
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, result, "Times of the mix", path)


_KINDS: dict[str, Callable[[Answer], float | None]] = {
    "first token": lambda answer: answer.first_s,
    "each token after it": lambda answer: answer.token_s,
    "whole request": lambda answer: answer.total_s,
}


def _by_decades(panel: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where the values need one."""
    if values and max(values) > DECADES * min(values):
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")


def _goodput(result: Mapping[str, Any], names: Sequence[str], path: Path) -> Path:
    figures = result["figures"]
    labels = [*map(_narrow, names), "all"]
    values = [100 * figures.get(f"{name}_goodput", 0.0) for name in names] + [100 * figures.get("goodput", 0.0)]
    figure, panel = plt.subplots(figsize=(max(5.0, 1.6 + 0.9 * len(labels)), 4.4), layout="constrained")
    colours = [*(COLOURS[index % len(COLOURS)] for index in range(len(names))), "#111111"]
    bars = panel.bar(labels, values, color=colours, width=0.6)
    counts = [*(figures.get(f"{name}_requests", 0) for name in names), figures.get("requests", 0)]
    panel.bar_label(bars, [f"{value:.0f}%\nof {count:.0f}" for value, count in zip(values, counts, strict=True)], fontsize=8)
    panel.set_ylim(0, 118)
    panel.set_ylabel("answered as promised, %")
    panel.tick_params(axis="x", labelrotation=30 if len(labels) > 5 else 0)
    return _save(figure, result, "Goodput", path)


def _span(arm: Arm) -> tuple[float, float] | None:
    """What is drawn of an arm: from its rest before the first burst to the end of what was measured."""
    if arm.idle is None:
        return None
    ends = [span[1] for span in (arm.idle, arm.busy, arm.after) if span]
    return arm.idle[0], max(ends)


def _save(figure: Any, result: Mapping[str, Any], what: str, path: Path) -> Path:
    head = f"orchestratorctl bench {result['experiment']}: {what}"
    if not result["complete"]:
        head += " (INCOMPLETE)"
    if result["simulated"]:
        head = f"SIMULATED GPU. {head}"
        figure.text(
            0.5,
            0.5,
            "SIMULATED GPU",
            fontsize=min(46.0, 5.4 * figure.get_size_inches()[0]),
            color="#c03030",
            alpha=0.22,
            ha="center",
            va="center",
            rotation=14,
            weight="bold",
        )
    wide, high = figure.get_size_inches()
    heads = wrap(head, int(wide * TITLE_IN))
    under = wrap(report.title(result), int(wide * UNDER_IN))
    top = 0.08 + 0.21 * len(heads)  # inches from the upper edge
    figure.text(0.01, 1 - 0.08 / high, "\n".join(heads), fontsize=11, va="top")
    figure.text(0.01, 1 - top / high, "\n".join(under), fontsize=8, color="#555555", va="top")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - (top + 0.16 * len(under) + 0.06) / high))
    for panel in figure.axes:
        panel.grid(axis="y", linewidth=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _narrow(name: str) -> str:
    return "\n".join(wrap(name, NARROW))


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * 0.6):02x}" for part in (red, green, blue))
