"""Model folders for measurements: of shapes alone, and of models whose longest request the daemon does not know.

The daemon refuses a ceiling under which a model's longest request could never run, as it should. A model that does not say how
long its requests may be (no `max_position_embeddings`, no --max-model-len of its own) can be given less: so requests can starve.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST = "max_position_embeddings"


def of_shape(folder: Path, shape: Mapping[str, Any]) -> Path:
    """A config.json: all that a simulated engine needs of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(shape)))
    return folder


def of_unknown_length(folder: Path, source: Path) -> Path:
    """`source` once more, by links, but for that one line of its config.json; vLLM takes its default (32768 for Qwen2) instead."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.resolve().iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != LONGEST}))
    return folder
