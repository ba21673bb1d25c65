"""What engines leave: processes that still write to a box's logs, kvcached's segments and worker sockets, GPU memory.

A process is found by its output, which every engine keeps to its end, whatever it calls itself and whoever its parent is.
"""

import glob
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from orchestrator.policy.model import slug


def writers(folder: Path, besides: Collection[int] = ()) -> dict[int, str]:
    """Living processes whose output goes to a file under `folder`, by pid; not those in the sessions of `besides`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                output = os.readlink(entry / "fd/1")
                session = os.getsid(int(entry.name))
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # it has just ended, or is not ours
                continue
            if output.startswith(f"{folder}/") and session not in besides:
                found[int(entry.name)] = words[:200]
    return found


def paths(models: Sequence[str]) -> list[str]:
    """Segments, and folders of worker sockets, of engines of these models."""
    return sorted(
        path
        for name in {slug(model)[:20] for model in models}
        for pattern in (f"/dev/shm/orch-{name}-*", f"/tmp/kvcached-tp-orch-{name}-*")
        for path in glob.glob(pattern)
    )
