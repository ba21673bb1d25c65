"""Print the pinned requirement of one package of the `engine` extra, for `make engine`: pyproject.toml is the only place that has it."""

import sys
import tomllib
from pathlib import Path

wanted = sys.argv[1]
project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
print(next(pin for pin in project["optional-dependencies"]["engine"] if pin.startswith(f"{wanted}==")))
