"""The kinds of experiments as the command line sees them: options into a plan, a plan into words, figures into a table and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli import tables
from orchestrator.cli.exits import Json
from orchestrator.experiments.progress import counted

if TYPE_CHECKING:
    from orchestrator.experiments.house import House
    from orchestrator.experiments.progress import Progress
    from orchestrator.experiments.watch import Watch

BURSTS = ("turns", "requests", "tokens", "prompt_tokens", "pause_s", "rounds", "settle_s")
MIX = ("rate", "seconds", "alpha", "variation", "trace", "on_s", "off_s", "scale", "seed", "ttft_s", "tpot_s", "calibration")
MIX_TABLE = ("MODEL", "REQUESTS", "TTFT-P50", "TTFT-P99", "TPOT-P50", "P50", "P99", "GOODPUT")


class Bursts:
    """single, and shared by several."""

    def __init__(self, kind: str, names: Sequence[str], given: Mapping[str, Any]) -> None:
        from orchestrator.experiments import bursts, record

        self.kind, self.names, self.record = kind, list(names), record.Record()
        self.plan = bursts.Plan(
            **{field: given[field] for field in BURSTS},
            utilization=None if given["no_static"] else given["static_utilization"],
            warmup=given["requests"],
            timeout_s=given["request_timeout"],
        )

    def before(self, house: "House") -> tuple[list[str], float]:
        from orchestrator.experiments import bursts

        bursts.check(house, self.plan)
        plan, names, many = self.plan, ", ".join(self.names), len(self.names) > 1
        lines = [
            f"{names} through the daemon: {counted(plan.turns, 'burst')}{' each, in turns,' if many else ''} of"
            f" {counted(plan.requests, 'request')},"
            f" {plan.tokens} tokens each, {plan.pause_s:g}s apart"
        ]
        if plan.utilization is not None:
            engine = "a static simulated engine" if house.simulated else "a plain vLLM"
            share = plan.utilization / len(self.names)
            lines.append(
                f"{names} {'are' if many else 'is'} unloaded; {engine} {'each ' if many else ''}with {share:.0%} of the GPU"
                f" ({tables.size(share * house.gpus[0]['total_bytes'])}) gets the same bursts"
            )
        return lines, plan.seconds(house)

    def measure(self, house: "House", watch: "Watch", out: Path, progress: "Progress") -> None:
        from orchestrator.experiments import bursts

        bursts.run(house, watch, self.plan, self.record, out, progress)

    def result(self) -> Json:
        from orchestrator.experiments import record, report

        return {"figures": record.figures_of(self.record, self.names), "arms": report.arms_of(self.record)}

    def page(self, result: Json) -> list[str]:
        from orchestrator.experiments import report

        rows = report.compared(result["figures"])
        return [tables.table(("", "DAEMON", "STATIC", "RATIO"), rows), "", *report.told(result["figures"])] if rows else []

    def pictures(self, result: Json, out: Path) -> list[Path]:
        from orchestrator.experiments import plots

        return plots.of_bursts(self.record, result, out)


class Mix:
    """Many models, some popular."""

    kind = "mix"

    def __init__(self, names: Sequence[str], given: Mapping[str, Any]) -> None:
        from orchestrator.experiments import mix, record

        self.names, self.record, self.outcome = list(names), record.Record(), mix.Outcome()
        self.plan = mix.Plan(**{field: given[field] for field in MIX}, timeout_s=given["request_timeout"])

    def before(self, house: "House") -> tuple[list[str], float]:
        plan = self.plan
        lines = [f"each model alone: {counted(plan.calibration, 'request')}, to know what it can promise"] if plan.calibrates else []
        rate = f"{plan.rate:g} requests a second for {tables.duration(plan.seconds)}"
        lines.append(f"{', '.join(self.names)}: {rate}, lengths of the trace {plan.trace!r}")
        return lines, plan.seconds_in_all(house)

    def measure(self, house: "House", watch: "Watch", out: Path, progress: "Progress") -> None:
        from orchestrator.experiments import mix

        mix.run(house, watch, self.plan, self.outcome, progress)

    def result(self) -> Json:
        from orchestrator.experiments import figures, mix

        answers = self.outcome.answers
        refusals, fates = figures.refusals(answers), [vars(answer) for answer in answers]
        return {"figures": mix.figures_of(self.outcome, self.names), "refusals": refusals, "answers": fates}

    def page(self, result: Json) -> list[str]:
        from orchestrator.experiments import report

        if not self.outcome.answers:
            return []
        found = result["figures"]
        refused = ", ".join(f"{count} {code}" for code, count in result["refusals"].items()) or "none"
        moves = ", ".join(f"{found[move]:.0f} {move}" for move in ("starts", "wakes", "sleeps", "stops", "failures"))
        return [tables.table(MIX_TABLE, report.of_mix(found, self.names)), "", f"refused or failed: {refused}", f"engines: {moves}"]

    def pictures(self, result: Json, out: Path) -> list[Path]:
        from orchestrator.experiments import plots

        return plots.of_mix(self.outcome, self.record, result, out)
