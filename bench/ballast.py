"""Somebody else's GPU process: takes and gives back device memory. Runs in the engine's venv, imports torch and nothing of ours.

Says `holding 0` when it has a context. Then commands on stdin: `take BYTES`, `give BYTES` (the newest blocks, whole ones); each is
answered with `holding BYTES at SECONDS` (CLOCK_MONOTONIC, the same in every process) or `refused: why`. Ends with its stdin.
The simulated engine's ballast speaks the same (without the seconds).
"""

import sys
import time

import torch


def main() -> int:
    device = torch.device("cuda:0")
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    blocks: list[torch.Tensor] = []
    held = 0
    print("holding 0", flush=True)
    for line in sys.stdin:
        verb, _, number = line.strip().partition(" ")
        try:
            size = int(number)
            if verb == "take":
                blocks.append(torch.empty(size, dtype=torch.uint8, device=device))
                held += size
            elif verb == "give":
                left = size
                while left > 0:
                    if not blocks or blocks[-1].numel() > left:
                        raise ValueError(f"give {size}: it ends inside a block; blocks: {[block.numel() for block in blocks]}")
                    freed = blocks.pop().numel()
                    left -= freed
                    held -= freed
                torch.cuda.empty_cache()
            else:
                raise ValueError(f"{verb!r} is no command")
            torch.cuda.synchronize()
        except (ValueError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            print(f"refused: {str(error).splitlines()[0]}", flush=True)
        else:
            print(f"holding {held} at {time.clock_gettime(time.CLOCK_MONOTONIC):.6f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
