"""The downloader as a process, against a hub of this machine: what it loads and leaves out, resumes, refuses, and how it says so."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.engine import pull as program
from tests.support.hub import COMMIT, Hub

MIB = 1 << 20
LARGE = random.Random(7).randbytes(20 * MIB)
FILES = {
    "config.json": b"{}",
    "model.safetensors": LARGE,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"x" * 100,
    "original/consolidated.00.pth": b"x" * 200,
    "model-q4.gguf": b"x" * 300,
}


def start(hub: Hub, home: Path, *words: str, **env: str) -> "subprocess.Popen[str]":
    """HF_HUB_ETAG_TIMEOUT: what cannot be reached is given up soon."""
    given = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", **env}
    command = [sys.executable, program.__file__, *(words or ("org/tiny",))]
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    out, err = process.communicate(timeout=60)
    assert out, err
    return [json.loads(line) for line in out.splitlines()]


def load(hub: Hub, home: Path, *words: str, **env: str) -> list[dict[str, Any]]:
    return end(start(hub, home, *words, **env))


def test_what_the_engine_needs_is_loaded_and_the_rest_is_named(tmp_path: Path) -> None:
    with Hub(FILES) as hub:
        first, *_, last = load(hub, tmp_path)
        total = len(LARGE) + 4
        assert (first["phase"], first["files"], first["total_bytes"], first["need_bytes"]) == ("asked", 3, total, total)
        assert [each["file"] for each in first["skipped"]] == ["pytorch_model.bin", "original/consolidated.00.pth", "model-q4.gguf"]
        folder = Path(last["path"])
        assert (last["phase"], folder.name, last["loaded_bytes"]) == ("done", COMMIT, total)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: FILES[name] for name in list(FILES)[:3]}
        assert (folder.parents[1] / "refs/main").read_text() == COMMIT
        first, *_, last = load(hub, tmp_path)  # again: nothing is to be done
        assert (first["need_bytes"], last["loaded_bytes"], len(hub.loads("model.safetensors"))) == (0, 0, 1)


def test_one_that_is_killed_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    with Hub(FILES) as hub:
        hub.hold = 10 * MIB
        process = start(hub, tmp_path)
        assert hub.held.wait(60)
        (kept,) = tmp_path.rglob(f"*{program.PART}")
        while kept.stat().st_size < 5 * MIB:  # on its way through the socket
            pass
        process.kill()
        process.communicate()
        hub.hold, size = None, kept.stat().st_size
        first, *_, last = load(hub, tmp_path)
        assert first["need_bytes"] == len(LARGE) - size
        assert hub.loads("model.safetensors") == ["", f"bytes={size}-"]
        assert (Path(last["path"]) / "model.safetensors").read_bytes() == LARGE
        assert not list(tmp_path.rglob("*.incomplete"))


def test_parts_that_do_not_fit_together_are_not_taken_for_a_model(tmp_path: Path) -> None:
    with Hub(FILES) as hub:
        blob = tmp_path / "hub/models--org--tiny/blobs" / __import__("hashlib").sha256(LARGE).hexdigest()
        blob.parent.mkdir(parents=True)
        program.part(blob).write_bytes(b"something else" * 1000)
        last = load(hub, tmp_path)[-1]
        assert (last["phase"], last["code"]) == ("failed", "changed")
        assert load(hub, tmp_path)[-1]["phase"] == "done"


def test_a_disk_that_is_too_small_is_said_before_a_byte_is_loaded(tmp_path: Path) -> None:
    with Hub(FILES) as hub:
        site = tmp_path / "site"  # a disk of its own would need root
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "import shutil\nwas = shutil.disk_usage\nshutil.disk_usage = lambda path: was(path)._replace(free=5 << 20)\n"
        )
        first, last = load(hub, tmp_path / "home", PYTHONPATH=str(site))
        assert (first["phase"], first["free_bytes"], last["code"]) == ("asked", 5 * MIB, "no_space")
        assert f"20.0MiB are needed and 5.0MiB are free on the disk of {tmp_path}/home/hub: free 15.0MiB there" in last["message"]
        assert not hub.loads("config.json")


@pytest.mark.parametrize(
    ("refusal", "code", "said"),
    [
        ((401, ""), "not_on_hub", "or is private: look at its spelling; for a private one set HF_TOKEN in engines.default.env"),
        ((403, "GatedRepo"), "gated", "is gated: ask for access at http://127.0.0.1"),
        ((404, "RepoNotFound"), "not_on_hub", "org/tiny is not on http://127.0.0.1"),
        ((404, "RevisionNotFound"), "not_on_hub", "has no revision 'main'"),
        ((418, ""), "hub_failed", "answered 418"),
    ],
)
def test_each_refusal_of_the_hub_has_its_line_and_its_mend(tmp_path: Path, refusal: tuple[int, str], code: str, said: str) -> None:
    with Hub(FILES) as hub:
        hub.refusal = refusal
        (last,) = load(hub, tmp_path)
        assert (last["phase"], last["code"]) == ("failed", code)
        assert said in last["message"]
        assert "\n" not in last["message"]


def test_a_hub_that_can_not_be_reached_is_said(tmp_path: Path) -> None:
    with Hub(FILES) as hub:
        (last,) = load(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
        assert (last["code"], "could not be reached" in last["message"]) == ("no_network", True)


def test_offline_nobody_is_asked_and_what_is_there_is_looked_at(tmp_path: Path) -> None:
    with Hub(FILES) as hub:
        (last,) = load(hub, tmp_path, HF_HUB_OFFLINE="1")
        assert (last["code"], hub.asked) == ("offline", [])
        assert f"org/tiny is not complete in {tmp_path}/hub: all of it is missing" in last["message"]
        folder = Path(load(hub, tmp_path)[-1]["path"])
        count = len(hub.asked)
        (last,) = load(hub, tmp_path, HF_HUB_OFFLINE="1")
        assert (last["phase"], last["offline"], last["path"], len(hub.asked)) == ("done", True, str(folder), count)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors", "b": "lost.safetensors"}}')
        (last,) = load(hub, tmp_path, HF_HUB_OFFLINE="1")
        assert "lost.safetensors is missing" in last["message"]


def test_a_venv_without_the_library_is_told_what_to_install(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-S", program.__file__, "org/tiny"], capture_output=True, text=True, check=False, env={"HOME": str(tmp_path)}
    )
    assert process.returncode == 1
    last = json.loads(process.stdout)
    assert (last["code"], "-m pip install huggingface_hub" in last["message"]) == ("no_hub_library", True)


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        (["config.json", "pytorch_model.bin", "tf_model.h5"], ["config.json", "pytorch_model.bin", "tf_model.h5"]),
        (["model-1.safetensors", "consolidated.safetensors", "x.bin"], ["model-1.safetensors"]),
        (["consolidated.safetensors", "params.json"], ["consolidated.safetensors", "params.json"]),
        (["a.gguf", "config.json", "original/x.pth"], ["config.json"]),
    ],
)
def test_what_is_chosen(files: list[str], kept: list[str]) -> None:
    found, skipped = program.choose(dict.fromkeys(files, 1))
    expected = [file for file in kept if file != "tf_model.h5"]
    assert (found, sorted(found + skipped)) == (expected, sorted(files))


def test_a_repository_of_nothing_that_vllm_reads_is_refused() -> None:
    with pytest.raises(program.Failed, match=r"no file in it that vLLM reads: a\.gguf"):
        program.choose({"a.gguf": 1})
