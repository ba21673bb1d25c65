"""Pictures: nothing runs over the edge or into another text, and what is too small beside the rest is shown once more."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

plots = pytest.importorskip("orchestrator.experiments.plots")

from matplotlib.figure import Figure  # noqa: E402

from orchestrator.experiments.answers import Answer  # noqa: E402
from orchestrator.experiments.record import Record  # noqa: E402
from orchestrator.experiments.samples import Held, Sample  # noqa: E402

GIB = 1 << 30
NAMES = ["qwen", "team/a-name-that-is-as-long-as-some-are"]
VERSIONS = {"orchestrator": "0.1.0", "vllm": "0.24.0", "kvcached": "0.1.6", "torch": "2.11.0"}


def record(static_gib: float) -> Record:
    found = Record(empty_bytes=[GIB // 2])
    for number, (name, gib) in enumerate((("daemon", 4.0), ("static", static_gib))):
        began = 100.0 * number
        arm = found.begin(name, 0, began)
        arm.idle, arm.after = (began, began + 5), (began + 20, began + 30)
        for at, model in enumerate(NAMES):
            arm.bursts.append((model, began + 5 + 5 * at, began + 9 + 5 * at))
            arm.answers.append([Answer(model, began + 5, 0.1, 1.0 + each, 10, None, None) for each in range(4)])
        held = {model: Held(int(gib * GIB / 3), 1 << 20, "ready") for model in NAMES}
        found.samples += [Sample(began + each, int(gib * GIB), 0, held) for each in range(31)]
    return found


def result() -> dict[str, Any]:
    told = {"experiment": "shared", "models": NAMES, "complete": True, "simulated": True, "date": "2026-01-02T03:04:05", "figures": {}}
    return {**told, "gpus": [{"name": "NVIDIA H200"}], "versions": VERSIONS}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Those that were drawn, by the name of their file; laid out, not painted."""
    made: dict[str, Figure] = {}

    def savefig(figure: Figure, path: Path, **more: Any) -> None:
        figure.draw_without_rendering()
        made[path.name] = figure

    monkeypatch.setattr(Figure, "savefig", savefig)
    return made


def test_what_is_too_small_to_be_seen_is_shown_enlarged_and_no_text_is_cut_or_lies_on_another(
    figures: dict[str, Figure], tmp_path: Path
) -> None:
    plots.of_bursts(record(static_gib=100.0), result(), tmp_path)
    assert {name: len(figure.axes) for name, figure in figures.items()} == {"vram.png": 2, "latency.png": 1, "vram-by-model.png": 3}
    assert figures["vram.png"].axes[1].get_ylim()[1] == pytest.approx(1.08 * 4.0)
    for name, figure in figures.items():
        heads = [text.get_window_extent() for text in figure.texts if text.get_rotation() == 0]
        panels = [box for panel in figure.axes if (box := panel.get_tightbbox())]
        for box in (*heads, *panels):
            assert -1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, (name, box)
            assert -1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1, (name, box)
        assert not any(head.overlaps(panel) for head in heads for panel in panels), name
        assert not heads[0].overlaps(heads[1]), name
    labels = [label.get_window_extent() for label in figures["latency.png"].axes[0].get_xticklabels()]
    assert all(one.x1 < other.x0 for one, other in pairwise(labels))


def test_what_is_seen_well_is_shown_once(figures: dict[str, Figure], tmp_path: Path) -> None:
    plots.of_bursts(record(static_gib=6.0), result(), tmp_path)
    assert (len(figures["vram.png"].axes), len(figures["vram-by-model.png"].axes)) == (1, 2)
