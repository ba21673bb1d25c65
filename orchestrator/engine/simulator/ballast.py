"""A foreign process on a simulated GPU: takes bytes, says so, and holds them until SIGTERM.

`python -m orchestrator.engine.simulator.ballast --gpu UUID --bytes N`; lines `take N` and `give N` on stdin change
what it holds. Each change is answered with `holding M`, or with `refused: …` when the card has not so much.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from .gpu import OutOfMemory, SimGpu, read_cards


def main() -> int:
    parser = argparse.ArgumentParser(prog="ballast")
    parser.add_argument("--gpu", required=True, help="uuid in $SIM_GPU_DIR/gpus.json")
    parser.add_argument("--bytes", type=int, required=True)
    args = parser.parse_args()
    root = Path(os.environ["SIM_GPU_DIR"])
    cards = [card for card in read_cards(root) if card.uuid == args.gpu]
    if not cards:
        parser.error(f"--gpu {args.gpu!r} is not in {root / 'gpus.json'}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    gpu = SimGpu(root, cards[0])
    try:
        return hold(gpu, args.bytes)
    finally:
        gpu.close()


def hold(gpu: SimGpu, count_bytes: int) -> int:
    try:
        gpu.take(count_bytes)
    except OutOfMemory as error:
        print(f"refused: {error}", flush=True)
        return 1
    print(f"holding {gpu.held}", flush=True)
    for line in sys.stdin:
        verb, _, number = line.strip().partition(" ")
        try:
            {"take": gpu.take, "give": gpu.give}[verb](int(number))
        except (KeyError, ValueError, OutOfMemory) as error:
            print(f"refused: {error}", flush=True)
        else:
            print(f"holding {gpu.held}", flush=True)
    while True:  # Without a stdin (/dev/null) it still holds.
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
