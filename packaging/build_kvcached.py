"""Builds kvcached into the engine venv whose Python runs this, against the CUDA that came with its torch: `make engine`.

So the machine needs a C++ compiler and Python's headers, no CUDA toolkit: torch's wheels bring CUDA's headers and libraries, but not the
names that a linker looks for (libcudart.so, libcuda.so). Those are made here, for the time of the build; at run time torch's own
libraries and the driver's take their places. A venv without CUDA's headers (torch from elsewhere) is built with the toolkit that there is.

    build_kvcached.py --check           is there what a build needs? before gigabytes are downloaded
    build_kvcached.py kvcached==0.1.6   build and install it
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path


def missing() -> str | None:
    """What a build lacks on this machine, and the mend."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "a C++ compiler is needed to build kvcached: `apt-get install g++`, or name yours in CXX"
    if not headers.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python's headers are needed to build kvcached ({headers}): `apt-get install python{version}-dev`"
    return None


def environment(packages: Path, links: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Of a build against the CUDA in `packages` (a venv's site-packages); `links`: a folder for what the linker looks for."""
    headers = next(iter(sorted(packages.glob("nvidia/*/include/cuda_runtime.h"))), None)
    runtime = next(iter(sorted(packages.glob("nvidia/*/lib/libcudart.so.*"))), None)
    if headers is None or runtime is None:
        return dict(given)
    (links / "libcudart.so").symlink_to(runtime)
    driver = ["-shared", "-x", "c++", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", str(links / "libcuda.so")]
    subprocess.run([given.get("CXX", "g++"), *driver], check=True)
    paths = [str(links), *filter(None, [given.get("LIBRARY_PATH")])]
    flags = [*filter(None, [given.get("LDFLAGS")]), "-Wl,--no-as-needed"]  # the driver's stand-in has no names that would be found needed
    return {**given, "CUDA_HOME": str(headers.parents[1]), "LIBRARY_PATH": os.pathsep.join(paths), "LDFLAGS": " ".join(flags)}


def main(words: list[str]) -> int:
    if words == ["--check"]:
        if (lack := missing()) is not None:
            print(lack, file=sys.stderr)
        return int(lack is not None)
    with tempfile.TemporaryDirectory() as links:
        env = environment(Path(sysconfig.get_path("purelib")), Path(links), os.environ)
        return subprocess.run([sys.executable, "-m", "pip", "install", "--no-build-isolation", *words], env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
