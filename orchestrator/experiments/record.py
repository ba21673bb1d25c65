"""What an experiment has measured so far: written while it runs, so that an interrupted one leaves what it has."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.experiments import figures
from orchestrator.experiments.answers import Answer
from orchestrator.experiments.samples import Sample
from orchestrator.policy.units import MIB


@dataclass
class Arm:
    """One way to serve the same requests: `daemon` or `static`. Times are the watch's seconds; a window is (begin, end)."""

    name: str
    round: int
    began_s: float
    ended_s: float | None = None
    idle: tuple[float, float] | None = None
    after: tuple[float, float] | None = None
    bursts: list[tuple[str, float, float]] = field(default_factory=list)  # model, begin, end
    answers: list[list[Answer]] = field(default_factory=list)  # of each burst

    @property
    def busy(self) -> tuple[float, float] | None:
        """From the first burst's begin to the last one's end."""
        return (self.bursts[0][1], self.bursts[-1][2]) if self.bursts else None


@dataclass
class Record:
    arms: list[Arm] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)  # the watch's own list
    empty_bytes: list[int] = field(default_factory=list)  # the GPUs without the models of the experiment
    notes: list[str] = field(default_factory=list)

    def begin(self, name: str, number: int, now_s: float) -> Arm:
        self.arms.append(Arm(name, number, now_s))
        return self.arms[-1]

    def of(self, name: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.name == name]

    def window(self, span: tuple[float, float] | None) -> list[Sample]:
        return [sample for sample in self.samples if span and span[0] <= sample.at_s <= span[1]]


def figures_of(record: Record, models: Sequence[str]) -> dict[str, float]:
    """Flat, by arm: `daemon_idle_mib`; then what compares the two. What was not measured is not there."""
    found: dict[str, float] = {}
    by_arm = {name: _arm(record, name, models) for name in ("daemon", "static") if record.of(name)}
    for name, values in by_arm.items():
        found |= {f"{name}_{key}": value for key, value in values.items()}
    ours, static = by_arm.get("daemon", {}), by_arm.get("static", {})
    if record.empty_bytes:
        found["empty_mib"] = empty = min(record.empty_bytes) / MIB
        if "idle_mib" in ours and "idle_mib" in static:
            saving = figures.saving(ours["idle_mib"], static["idle_mib"], empty)
            found |= {"idle_saving_vs_static": saving} if saving is not None else {}
            found["idle_saved_mib"] = static["idle_mib"] - ours["idle_mib"]
    for key, name in (
        ("latency_p50_s", "latency_ratio"),
        ("latency_p95_s", "latency_p95_ratio"),
        ("ttft_p50_s", "ttft_ratio"),
        ("tokens_per_s", "throughput_ratio"),
    ):
        if (ratio := figures.ratio(ours, static, key)) is not None:
            found[name] = ratio
    return found


def _arm(record: Record, name: str, models: Sequence[str]) -> dict[str, float]:
    """Of all its rounds: memory as their median, answers together."""
    arms = record.of(name)
    memories = [figures.memory(record.window(arm.idle), record.window(arm.busy), record.window(arm.after)) for arm in arms]
    found = {
        key: figures.percentile([memory[key] for memory in memories if key in memory], 0.5)
        for key in ("idle_mib", "peak_mib", "flex_mib", "end_mib")
        if any(key in memory for memory in memories)
    }
    bursts = [burst for arm in arms for burst in arm.answers]
    answers = [answer for burst in bursts for answer in burst]
    found |= {"requests": len(answers), "failed": sum(answer.error is not None for answer in answers), **figures.times(answers)}
    if answers:
        found["tokens_per_s"] = figures.throughput(bursts)
    if len(models) > 1:
        for model in models:
            times = figures.times([answer for answer in answers if answer.model == model])
            found |= {f"{model}_{key}": value for key, value in times.items() if key.startswith("latency")}
    return found
