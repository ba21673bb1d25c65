"""What `make engine` builds kvcached with: the CUDA that came with the venv's torch, and no toolkit of the machine."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_kvcached", ROOT / "packaging/build_kvcached.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linked(*words: str | Path, env: dict[str, str] | None = None) -> None:
    subprocess.run(["g++", "-shared", "-fPIC", *map(str, words)], check=True, env=env)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A venv's site-packages as torch's wheels fill it: headers, and libraries without the names that linkers look for."""
    there = tmp_path / "site-packages"
    for name in ("include", "lib"):
        (there / "nvidia/cu13" / name).mkdir(parents=True)
    (there / "nvidia/cu13/include/cuda_runtime.h").write_text('extern "C" int cudaFree(void*);\n')
    source = tmp_path / "cudart.cpp"
    source.write_text('extern "C" int cudaFree(void*) { return 0; }\n')
    linked(source, "-Wl,-soname,libcudart.so.13", "-o", there / "nvidia/cu13/lib/libcudart.so.13")
    return there


def test_what_is_linked_wants_the_drivers_and_torchs_own_libraries(build: ModuleType, packages: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    env = build.environment(packages, links, os.environ)
    source, made = tmp_path / "core.cpp", tmp_path / "core.so"
    source.write_text('#include <cuda_runtime.h>\nextern "C" int cuMemCreate();\nint go() { return cuMemCreate() + cudaFree(nullptr); }\n')
    linked("-Wl,--as-needed", f"-I{env['CUDA_HOME']}/include", *env["LDFLAGS"].split(), source, "-lcuda", "-lcudart", "-o", made, env=env)
    told = subprocess.run(["readelf", "-d", str(made)], capture_output=True, text=True, check=True).stdout
    assert {"libcuda.so.1", "libcudart.so.13"} <= set(re.findall(r"NEEDED.*\[(.*)\]", told))


def test_what_was_set_before_stays(build: ModuleType, packages: Path, tmp_path: Path) -> None:
    env = build.environment(packages, tmp_path, {"PATH": os.environ["PATH"], "LIBRARY_PATH": "/own", "LDFLAGS": "-Wl,-O1"})
    assert env["LIBRARY_PATH"] == f"{tmp_path}:/own"
    assert env["LDFLAGS"].split() == ["-Wl,-O1", "-Wl,--no-as-needed"]


def test_a_venv_without_cuda_is_built_with_what_the_machine_has(build: ModuleType, tmp_path: Path) -> None:
    assert build.environment(tmp_path, tmp_path, {"CUDA_HOME": "/usr/local/cuda"}) == {"CUDA_HOME": "/usr/local/cuda"}


def test_a_missing_compiler_is_said_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = subprocess.run(["make", "-C", str(ROOT), "engine", "ENGINE=/nonexistent"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "a C++ compiler is needed to build kvcached: `apt-get install g++`, or name yours in CXX" in done.stderr
    assert "venv" not in done.stdout


def test_missing_headers_are_said_too(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert re.search(r"Python's headers are needed .*Python.h.*apt-get install python3\.\d+-dev", build.missing())
