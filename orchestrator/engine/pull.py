"""Loads a model from the hub into the cache that engines read: asked for its size first, resumed where it was cut, told line by line.

Run as a file by an engine venv's own Python: huggingface_hub is there, and only there. Prints one JSON object a line, the last with phase
`done` or `failed`; ends with 0 or 1. Where a file goes is the library's to know: here only that it looks for `blobs/<etag>` before it
downloads. It keeps nothing of a file that was cut (since 2.0), so large ones are loaded here, into a part that the next run goes on with.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

TELL_S = 0.5
AT_ONCE = 4  # files
LARGE = 16 << 20  # a smaller one is loaded anew in a second
MOST_PLAIN = 50 * 1000**3  # a larger file is not served without xet, which the library then uses, and which goes on with nothing
PART = ".pull.incomplete"
# vLLM reads none of these where there are safetensors; original/ and the like hold the same weights once more.
OTHER_WEIGHTS = ("*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.ckpt")
NEVER = ("*.gguf", "original/*", "onnx/*", "openvino/*", "coreml/*", "metal/*", "flax_model*", "tf_model*", "runs/*", "*.mlmodel", "*.nemo")


UNREACHED = frozenset({"OSError", "RequestException", "HTTPError", "TransportError"})  # of any library that the hub's goes by


class Failed(Exception):
    """`code`: for programs; the text says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    words = argparse.ArgumentParser()
    words.add_argument("--revision", default="main")
    words.add_argument("source")
    asked = words.parse_args()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        pull(asked.source, asked.revision)
    except Failed as error:
        say(phase="failed", code=error.code, message=str(error))
        return 1
    return 0


def say(**told: object) -> None:
    """To whoever asked; without them there is nobody to load for."""
    try:
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    except OSError:
        os._exit(1)


def pull(source: str, revision: str) -> None:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError:
        raise Failed(
            "no_hub_library", f"{sys.executable} has no huggingface_hub: `{sys.executable} -m pip install huggingface_hub`"
        ) from None
    try:
        Pull(huggingface_hub, source, revision).run()
    except Failed:
        raise
    except Exception as error:
        explain(error, source, revision)


class Pull:
    def __init__(self, hub: Any, source: str, revision: str) -> None:
        self._hub, self._source, self._revision = hub, source, revision
        self._cache = Path(hub.constants.HF_HUB_CACHE)
        self._blobs = self._cache / hub.file_download.repo_folder_name(repo_id=source, repo_type="model") / "blobs"
        self._now = ""  # the file that was begun last
        self._over = threading.Event()

    def run(self) -> None:
        began = time.monotonic()
        if self._hub.constants.HF_HUB_OFFLINE:
            return self._offline()
        info = self._hub.HfApi().model_info(self._source, revision=self._revision, files_metadata=True)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings}
        etags = {each.rfilename: (each.lfs and each.lfs.sha256) or each.blob_id or "" for each in info.siblings}
        chosen, skipped = choose(sizes)
        total, free = sum(sizes[file] for file in chosen), shutil.disk_usage(existing(self._cache)).free

        def there(file: str) -> int:
            cached = self._hub.try_to_load_from_cache(self._source, file, revision=info.sha)
            blob = self._blobs / etags[file]
            return sizes[file] if isinstance(cached, str) or (etags[file] and blob.exists()) else min(size_of(part(blob)), sizes[file])

        def done() -> int:
            return sum(map(there, chosen))

        need = total - done()
        say(
            phase="asked", source=self._source, revision=info.sha, files=len(chosen), total_bytes=total, need_bytes=need, free_bytes=free,
            path=str(self._cache), skipped=[{"file": file, "bytes": sizes[file]} for file in skipped],
        )  # fmt: skip
        if need > free:
            missing = f"{human(need)} are needed and {human(free)} are free on the disk of {self._cache}"
            mend = f"free {human(need - free)} there, or set HF_HOME in engines.*.env to a larger disk"
            raise Failed("no_space", f"{self._source}: {missing}: {mend}")
        teller = threading.Thread(target=self._tell, args=(done, total), daemon=True)
        teller.start()
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for _ in pool.map(lambda file: self._load(file, sizes[file], info.sha), sorted(chosen, key=sizes.__getitem__)):
                    pass
        finally:
            self._over.set()
            teller.join()
        smallest = min(chosen, key=sizes.__getitem__)
        folder = Path(self._hub.hf_hub_download(self._source, smallest, revision=self._revision))  # which notes what `main` means now
        for _ in Path(smallest).parts:
            folder = folder.parent
        say(phase="done", path=str(folder), total_bytes=total, loaded_bytes=need, seconds=round(time.monotonic() - began, 1))

    def _tell(self, done: Any, total: int) -> None:
        while not self._over.wait(TELL_S):
            say(phase="downloading", file=self._now, done_bytes=done(), total_bytes=total)

    def _load(self, file: str, size: int, revision: str) -> None:
        self._now = file
        if LARGE <= size <= MOST_PLAIN and not isinstance(self._hub.try_to_load_from_cache(self._source, file, revision=revision), str):
            url = self._hub.hf_hub_url(self._source, file, revision=revision)
            etag = self._hub.get_hf_file_metadata(url).etag
            if etag and re.fullmatch(r"[\w.-]+", etag) and not (self._blobs / etag).exists():
                self._load_blob(url, self._blobs / etag, size)
        self._hub.hf_hub_download(self._source, file, revision=revision)

    def _load_blob(self, url: str, blob: Path, size: int) -> None:
        blob.parent.mkdir(parents=True, exist_ok=True)
        begun = size_of(part(blob))
        if begun > size:
            part(blob).unlink()
            begun = 0
        if begun < size:
            with open(part(blob), "ab") as out:
                headers = self._hub.utils.build_hf_headers()
                self._hub.file_download.http_get(url, out, resume_size=begun, headers=headers, expected_size=size)
        if begun and len(blob.name) == 64 and digest(part(blob)) != blob.name:  # of two runs: the file may have been another in the first
            part(blob).unlink()
            raise Failed("changed", f"{url}: what was loaded before and now does not fit together: ask again, it is loaded anew")
        os.replace(part(blob), blob)

    def _offline(self) -> None:
        """Nothing is asked of anybody; what is there is looked at."""
        folder = snapshot(self._hub, self._source, self._revision)
        missing = ["all of it"] if folder is None else list(lacking(folder))
        if folder is None or missing:
            lost = f"{self._source} is not complete in {self._cache}: {', '.join(missing[:3])} is missing"
            raise Failed("offline", f"HF_HUB_OFFLINE is set, so nothing is loaded, and {lost}: unset it to load")
        found = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        say(phase="done", path=str(folder), total_bytes=found, loaded_bytes=0, seconds=0.0, offline=True)


def choose(sizes: dict[str, int]) -> tuple[list[str], list[str]]:
    """What vLLM needs of a repository's files, and what is left out."""
    kept = [file for file in sizes if not among(file, NEVER)]
    if any(file.endswith(".safetensors") for file in kept):
        kept = [file for file in kept if not among(file, OTHER_WEIGHTS)]
    if any(fnmatch.fnmatch(file, "model*.safetensors") for file in kept):  # Mistral's repositories have all weights twice
        kept = [file for file in kept if not fnmatch.fnmatch(file, "consolidated*")]
    if not kept:
        raise Failed("no_weights", f"there is no file in it that vLLM reads: {', '.join(list(sizes)[:5]) or 'it is empty'}")
    return kept, [file for file in sizes if file not in kept]


def among(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def snapshot(hub: Any, source: str, revision: str) -> Path | None:
    found = (hub.try_to_load_from_cache(source, file, revision=revision) for file in ("config.json", "adapter_config.json"))
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def lacking(folder: Path) -> Iterator[str]:
    """Weights that its index names, or that any model has."""
    indexes = list(folder.glob("*.index.json"))
    for index in indexes:
        shards = set(json.loads(index.read_text())["weight_map"].values())
        yield from sorted(shard for shard in shards if not (folder / shard).exists())
    if not indexes and not any(path.suffix in (".safetensors", ".bin", ".pt", ".pth") for path in folder.iterdir()):
        yield "its weights"


def part(blob: Path) -> Path:
    return blob.with_name(blob.name + PART)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def existing(path: Path) -> Path:
    """It, or what is above it and there."""
    while not path.exists():
        path = path.parent
    return path


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def human(size: int) -> str:
    return f"{size / (1 << 30):.1f}GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f}MiB"


def explain(error: Exception, source: str, revision: str) -> NoReturn:
    """What came of asking, as one line with the mend."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    token = "set HF_TOKEN in engines.default.env (or in the model's env)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in kinds:
        raise Failed("gated", f"{source} is gated: ask for access at {where}/{source}, and {token}")
    if "RevisionNotFoundError" in kinds:
        raise Failed("not_on_hub", f"{source} has no revision {revision!r}: {where}/{source}/tree/main names them")
    if "RepositoryNotFoundError" in kinds or status in (401, 403):
        raise Failed("not_on_hub", f"{source} is not on {where}, or is private: look at its spelling; for a private one {token}")
    if "HFValidationError" in kinds:
        raise Failed("not_on_hub", f"{source!r} is not a hub id: write it like Qwen/Qwen2.5-7B-Instruct")
    if isinstance(error, OSError) and error.errno:
        at = f" {error.filename}" if error.filename else ""
        raise Failed("disk", f"{source}: {error.strerror}{at}: what is loaded is kept; make room, or make it writable, then ask again")
    if status is not None:
        raise Failed("hub_failed", f"{where} answered {status} for {source}: what is loaded is kept; ask again later")
    if not kinds & UNREACHED:
        raise error  # a fault of ours
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise Failed("no_network", f"{where} could not be reached for {source} ({reason}): what is loaded is kept; ask again when it can")


if __name__ == "__main__":
    sys.exit(main())
