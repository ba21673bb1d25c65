"""What an operator writes: which source wins, and that every mistake is found at once, with its file and line and the nearest right name.

The command is run as a process where its exit code or its output is the contract; elsewhere `load` is called as the daemon does.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator import settings
from orchestrator.config_errors import load
from orchestrator.errors import ConfigError
from orchestrator.policy.units import GIB, MIB
from orchestrator.settings import Settings

ROOT = Path(orchestrator.__file__).parent.parent
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("ORCH_") or name in (
            "STATE_DIRECTORY",
            "RUNTIME_DIRECTORY",
            "LOGS_DIRECTORY",
            "XDG_RUNTIME_DIR",
            "CREDENTIALS_DIRECTORY",
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str, name: str = "a.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return written


def problems(*files: Path) -> list[str]:
    """Each problem as a line, without the folder of the file."""
    with pytest.raises(ConfigError) as caught:
        load(files, os.environ)
    assert caught.value.exit_code == 78
    return [str(problem).replace(f"{files[0].parent}/" if files else "", "") for problem in caught.value.problems]


def only(*files: Path) -> str:
    found = problems(*files)
    assert len(found) == 1, found
    return found[0]


# ---- which source wins ----------------------------------------------------------------------------------------------------


def test_defaults_hold_where_nothing_is_said() -> None:
    found = load([], {})
    assert (found.listen.host, found.listen.port, found.admin.tcp, found.models) == ("127.0.0.1", 8000, False, {})
    assert found.gpus.source == "nvml"


def test_the_file_is_stronger_than_the_default_and_the_environment_than_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("listen: {port: 8001}\nlog: {level: debug}\nengines:\n  default: {stop_grace: 3s}\n")
    monkeypatch.setenv("ORCH_LISTEN__PORT", "8002")
    monkeypatch.setenv("orch_gpus__simulated__memory", "24GiB")  # the case of a variable does not matter
    monkeypatch.setenv("ORCH_ENGINES__DEFAULT__ARGS", '["--enforce-eager"]')
    found = load([path], os.environ)
    assert (found.listen.port, found.listen.host, found.log.level) == (8002, "127.0.0.1", "debug")
    assert found.gpus.simulated.memory == 24 * GIB
    assert (found.engines["default"].stop_grace, found.engines["default"].args) == (3.0, ("--enforce-eager",))


def test_later_files_add_and_override_single_values(write: Write) -> None:
    first = write("listen: {port: 8001, host: '::1'}\nmodels: {a: {source: o/a}}\n", "1.yaml")
    second = write("listen: {port: 8002}\nmodels: {b: {source: o/b, aliases: [c]}}\n", "2.yaml")
    found = load([first, second], os.environ)
    assert (found.listen.port, found.listen.host) == (8002, "::1")
    assert [(spec.name, spec.aliases) for spec in found.models.values()] == [("a", ()), ("b", ("c",))]


def test_an_empty_file_and_empty_sections_are_the_defaults(write: Write) -> None:
    assert load([write(""), write("# nothing\n", "b.yaml"), write("listen:\nmodels:\n", "c.yaml")], os.environ) == load([], {})


def test_dates_are_names_like_others(write: Write) -> None:
    assert list(load([write("models: {2024-11-20: {source: o/a}}\n")], os.environ).models) == ["2024-11-20"]


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 * MIB), ("2.5GiB", 5 * GIB // 2), ("3G", 3 * GIB), ("4096", 4096), ("0", 0)])
def test_sizes(write: Write, text: str, size: int) -> None:
    assert load([write(f"memory: {{reserve: {text}}}\n")], os.environ).memory.reserve == size


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("0.5", 0.5), ("'3'", 3)])
def test_durations(write: Write, text: str, seconds: float) -> None:
    assert load([write(f"requests: {{max_wait: {text}}}\n")], os.environ).requests.max_wait == seconds


def test_folders_follow_what_is_set_then_systemd_then_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert (str(Settings().state_dir), str(Settings().runtime_dir)) == ("/var/lib/orchestrator", "/run/orchestrator")
    monkeypatch.setattr(os, "getuid", lambda: 7)
    assert str(Settings().runtime_dir) == "/tmp/orchestrator-7"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert str(Settings().admin_socket) == "/run/user/7/orchestrator/admin.sock"
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/o:/run/p")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/o")
    assert (str(Settings().runtime_dir), str(Settings().logs_dir)) == ("/run/o", "/var/lib/o/logs")
    monkeypatch.setenv("ORCH_DIRS__RUNTIME", "/r")
    assert str(Settings().runtime_dir) == "/r"


# ---- files that cannot be read --------------------------------------------------------------------------------------------


def test_a_missing_file_and_the_one_that_was_meant(write: Write, tmp_path: Path) -> None:
    write("", "orchestrator.yaml")
    assert only(tmp_path / "orchestrater.yaml") == "orchestrater.yaml: there is no such config file; did you mean orchestrator.yaml?"
    assert "there is no such config file" in only(Path("/nowhere/at/all.yaml"))


def test_a_folder_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    assert "cannot be read" in only(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"log: {level: \xe9}\n")
    assert only(tmp_path / "latin.yaml").startswith("latin.yaml: cannot be read: 'utf-8'")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("listen: {port: 1\n", "a.yaml:2:1: not YAML: "),
        ("listen:\n  port: 1\n port: 2\n", "a.yaml:3:2: not YAML: "),
        ("a: b: c\n", "a.yaml:1:5: not YAML: "),
        ("log: !!python/object:os.system {}\n", "a.yaml:1:6: not YAML: "),
        ("log: *nowhere\n", "a.yaml:1:6: not YAML: "),
        ("a: 1\n---\nb: 2\n", "a.yaml:2:1: not YAML: "),
        ("log: {level: !!int x}\n", "a.yaml: not YAML: "),
        ("log: \x01\n", "a.yaml: not YAML: "),
        ("[" * 5000, "a.yaml: not YAML: "),
        ("log: &a {level: *a}\n", "a.yaml: an anchor (&) holds its own alias"),
        ("- a\n", "a.yaml:1:1: a config file is a map of settings"),
        ("text\n", "a.yaml:1:1: a config file is a map of settings"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_config_file(write: Write, text: str, where: str) -> None:
    assert only(write(text)).startswith(where)


def test_a_broken_file_does_not_hide_the_faults_of_another(write: Write) -> None:
    assert [line.split(":")[0] for line in problems(write("a: [\n"), write("lisen: {}\n", "b.yaml"))] == ["a.yaml", "b.yaml"]


# ---- keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lisen: {}\n", "a.yaml:1:1: lisen: unknown setting; did you mean 'listen'?"),
        ("listen:\n  prot: 1\n", "a.yaml:2:3: listen.prot: unknown setting; did you mean 'port'?"),
        ("gpus: {simulated: {cuont: 1}}\n", "a.yaml:1:20: gpus.simulated.cuont: unknown setting; did you mean 'count'?"),
        ("models: {m: {source: o/m, kv_flor: 1}}\n", "a.yaml:1:27: models.m.kv_flor: unknown setting; did you mean 'kv_floor'?"),
        ("engines: {default: {pyton: /x}}\n", "a.yaml:1:21: engines.default.pyton: unknown setting; did you mean 'python'?"),
        ("listen: {x: 1}\n", "a.yaml:1:10: listen.x: unknown setting; known here: host, port"),
        ('"[x": 1\n', "a.yaml:1:1: [x: unknown setting; known here: admin, "),
        ('"{": 1\n', "a.yaml:1:1: {: unknown setting; known here: admin, "),
        ('listen: {"[port]": 1}\n', "a.yaml:1:10: listen.[port]: unknown setting; did you mean 'port'?"),
        ("7: {}\n", 'a.yaml:1:1: 7: the key 7 is not text: quote it, "7"'),
        ("on: {}\n", 'a.yaml:1:1: on: the key on is not text: quote it, "on"'),
        ("models:\n  7: {source: o/m}\n", 'a.yaml:2:3: models.7: the key 7 is not text: quote it, "7"'),
        ("models:\n  m: {source: o/m, env: {1: x}}\n", 'a.yaml:2:26: models.m.env.1: the key 1 is not text: quote it, "1"'),
        ("listen: {port: 1, port: 2}\n", "a.yaml:1:19: listen.port: is given twice (first in line 1): remove one"),
        ("models:\n  m: {source: o/m}\n  m: {source: o/n}\n", "a.yaml:3:3: models.m: is given twice (first in line 2): remove one"),
        ("log: {}\nlisten: {}\nlog: {}\n", "a.yaml:3:1: log: is given twice (first in line 1): remove one"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_keys_that_no_setting_has(write: Write, text: str, says: str) -> None:
    assert only(write(text)).startswith(says)


def test_a_model_in_two_files(write: Write) -> None:
    first = write("models:\n  m: {source: o/m}\n  7: {source: o/m}\n", "1.yaml")
    second = write("# more\nmodels:\n  m: {source: o/n}\n  7: {source: o/m}\n", "2.yaml")
    assert "2.yaml:3:3: models.m: is defined in an earlier config file too: remove one" in problems(first, second)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ORCH_LISTEN__PROT", "1", "ORCH_LISTEN__PROT: there is no such setting; did you mean ORCH_LISTEN__PORT?"),
        ("ORCH_LISTEN_PORT", "1", "ORCH_LISTEN_PORT: there is no such setting; did you mean ORCH_LISTEN__PORT?"),
        ("ORCH_ZZZZZZZ", "1", "ORCH_ZZZZZZZ: there is no such setting; `orchestratord schema` lists all settings"),
        ("orch_listen__prot", "1", "orch_listen__prot: there is no such setting; did you mean ORCH_LISTEN__PORT?"),
        ("ORCH_LISTEN__PORT__X", "1", "ORCH_LISTEN__PORT__X: there is no such setting; did you mean ORCH_LISTEN__PORT?"),
        ("ORCH_ENGINES__GPU__PYTON", "1", "ORCH_ENGINES__GPU__PYTON: there is no such setting; did you mean"),
        ("ORCH_LISTEN__PORT", "x", "ORCH_LISTEN__PORT: listen.port: 'x': input should be a valid integer"),
        ("ORCH_MEMORY__RESERVE", "3GB", "ORCH_MEMORY__RESERVE: memory.reserve: '3GB' is ambiguous (decimal or binary?): write 3GiB"),
        ("ORCH_LISTEN", '{"port": 99999}', "ORCH_LISTEN: listen.port: 99999: input should be less than or equal to 65535"),
        ("ORCH_MODELS", "{", "environment: "),
    ],
)
def test_variables(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(name, value)
    assert problems()[0].startswith(says)


def test_variables_of_the_commands_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORCH_CONFIG", "ORCH_HOST", "ORCH_ADMIN_KEY"):
        monkeypatch.setenv(name, "x")
    load([], os.environ)


# ---- values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("listen: {port: 70000}", "a.yaml:1:10: listen.port: 70000: input should be less than or equal to 65535"),
        ("listen: 5", "a.yaml:1:1: listen: 5: input should be a valid dictionary"),
        ("models: [{name: a}]", "a.yaml:1:1: models: "),
        ("models: 5", "a.yaml:1:1: models: "),
        ("models: {m: null}", "a.yaml:1:10: models.m: None: input should be a valid dictionary"),
        ("models: {m: {aliases: [x]}}", "a.yaml:1:10: models.m.source: is missing"),
        ("models: {a b: {source: o/m}}", "a.yaml:1:10: models.a b.name: 'a b' is not a name: use "),
        ("models: {m: {name: n, source: o/m}}", "a.yaml:1:1: models: 'm' is named 'n' inside: remove `name`"),
        ("models: {m: {source: o/m, args: [--port=1]}}", "a.yaml:1:27: models.m.args: --port belongs to the daemon: remove it; "),
        ("models: {m: {source: o/m, env: {VLLM_PORT: '1'}}}", "a.yaml:1:27: models.m.env: VLLM_PORT belongs to the daemon: remove it"),
        ("models: {m: {source: o/m, priority: 9}}", "a.yaml:1:27: models.m.priority: 9: input should be less than or equal to 8"),
        ("models: {m: {source: o/m, idle_timeout: soon}}", "a.yaml:1:27: models.m.idle_timeout: 'soon' is not a duration: "),
        ("models: {m: {source: o/m, kv_floor: 2GiB, kv_ceiling: 1GiB}}", "a.yaml:1:10: models.m: kv_floor (2048MiB) is above kv_ceiling"),
        ("memory: {reserve: 3GB}", "a.yaml:1:10: memory.reserve: '3GB' is ambiguous (decimal or binary?): write 3GiB"),
        ("memory: {reserve: -1}", "a.yaml:1:10: memory.reserve: -1 is not a size between 0 and 1024TiB: "),
        ("memory: {reserve: 2 apples}", "a.yaml:1:10: memory.reserve: '2 apples' is not a size: "),
        ("requests: {max_wait: 0}", "a.yaml:1:12: requests.max_wait: 0 is not a duration between 0 and 366 days: "),
        ("requests: {max_body: 1}", "a.yaml:1:12: requests.max_body: 1: input should be greater than or equal to 1024"),
        ("log: {level: 2020-13-45}", "a.yaml:1:7: log.level: '2020-13-45': input should be 'debug', 'info', "),
        ("gpus: {source: simulate}", "a.yaml:1:8: gpus.source: 'simulate': input should be 'nvml', 'simulated' or 'auto'"),
        (
            "engines: {default: {args: [--api-key, x]}}\n",
            "a.yaml:1:21: engines.default.args: --api-key belongs to the daemon: remove it; engines are reachable by the daemon alone",
        ),
        ("engines: {default: {env: {VLLM_PORT: '1'}}}\n", "a.yaml:1:21: engines.default.env: VLLM_PORT belongs to the daemon: remove it"),
        ("engines: {}", "a.yaml:1:1: engines: Dictionary should have at least 1 item"),
        ("keys: {required: maybe}", "a.yaml:1:8: keys.required: 'maybe': input should be 'auto', 'always' or 'never'"),
        ("admin: {tcp: true}", "a.yaml:1:9: admin.tcp: is on without a key: set admin.key (or ORCH_ADMIN__KEY), or turn it off"),
        ("models: {q2.5: {source: o/m, engine: x}}", "a.yaml:1:30: models.q2.5.engine: there is no engine 'x'; known: default"),
        ("engines: {gpu: {}}\nmodels: {q2.5: {source: o/m}}", "a.yaml:2:10: models.q2.5.engine: there is no engine 'default'; known: gpu"),
        ("models:\n  a: {source: o/m}\n  b: {source: o/m, aliases: [a]}", "a.yaml:3:3: models.b: the name 'a' is already that of 'a'"),
        ("models:\n  a: {source: o/m, aliases: [x]}\n  b: {source: o/m, aliases: [x]}", "a.yaml:3:3: models.b: the name 'x' is already"),
    ],
    ids=lambda value: repr(value)[:48],
)
def test_values_that_cannot_be(write: Write, text: str, says: str) -> None:
    assert only(write(text)).startswith(says)


def test_the_admin_key_may_be_a_credential_of_systemd_and_is_weaker_than_what_is_written(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write("admin: {tcp: true, key: null}\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert only(file).startswith("a.yaml:1:9: admin.tcp: is on without a key")
    (tmp_path / "admin.key").write_text(" ")
    assert only(file).startswith("a.yaml:1:9: admin.tcp: is on without a key")
    (tmp_path / "admin.key").write_text("hunter2\n")
    found = load([file], os.environ)
    assert (found.admin_key and found.admin_key.get_secret_value(), "hunter2" in repr(found)) == ("hunter2", False)
    monkeypatch.setenv("ORCH_ADMIN__KEY", "stronger")
    found = load([file], os.environ)
    assert found.admin_key is not None
    assert found.admin_key.get_secret_value() == "stronger"
    monkeypatch.delenv("ORCH_ADMIN__KEY")
    (tmp_path / "admin.key").unlink()
    (tmp_path / "admin.key").mkdir()
    assert "admin.key: the credential cannot be read: " in only(file)


def test_a_key_is_never_shown(write: Write) -> None:
    assert "hunter2" not in "".join(problems(write("admin: {key: [hunter2], kye: hunter2, tcp: hunter2x}\n"))).replace("hunter2x", "")
    assert "(hidden)" in only(write("admin: {key: 5}\n"))


@pytest.mark.parametrize("letter", ["x", "ž"])
def test_a_runtime_folder_must_leave_room_for_the_names_of_sockets(write: Write, letter: str) -> None:
    """107 bytes are a socket's name; vLLM makes <runtime>/engines/<8>/<36>."""
    fits = "/" + letter * (52 // len(letter.encode()))
    assert len(os.fsencode(fits)) == 53
    assert len(os.fsencode(f"{fits}/engines/12345678/" + "u" * 36)) == 107
    load([write(f"dirs: {{runtime: {fits}}}\n")], os.environ)
    assert only(write(f"dirs: {{runtime: {fits}{letter}}}\n")).startswith("a.yaml:1:8: dirs.runtime: /")


def test_a_fault_between_values_of_several_sources_is_where_it_was_written(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_ADMIN__TCP", "true")
    assert only(write("admin: {socket: /run/x}\n")).startswith("ORCH_ADMIN__TCP: admin.tcp: is on without a key")


def test_everything_is_said_at_once(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORCH_LISTEN_PORT", "1")
    first = write("listen: {port: 70000, host: 0.0.0.0}\nadmin: {tcp: true}\nmodels:\n  q2.5: {source: o/m, engine: x}\n", "1.yaml")
    models = "models:\n  a b: {source: o/m}\n  c: {sorce: o/m, kv_floor: 3GB}\n  d: {source: o/m, aliases: [q2.5]}\n"
    second = write(f"{models}log: {{}}\nlog: {{}}\n", "2.yaml")
    found = problems(first, second, tmp_path / "3.yaml")
    assert {re.sub(r"^(\d\.yaml(:\d+)?)(:\d+)?: ([^:]*).*", r"\1 \4", line) for line in found} == {
        "1.yaml:1 listen.port", "1.yaml:2 admin.tcp", "1.yaml:4 models.q2.5.engine",
        "2.yaml:2 models.a b.name", "2.yaml:3 models.c.sorce", "2.yaml:3 models.c.source", "2.yaml:3 models.c.kv_floor",
        "2.yaml:4 models.d", "2.yaml:6 log", "3.yaml there is no such config file; did you mean 2.yaml?",
        "ORCH_LISTEN_PORT: there is no such setting; did you mean ORCH_LISTEN__PORT?",
    }  # fmt: skip
    assert len(found) == len(set(found)) == 11


# ---- the command ----------------------------------------------------------------------------------------------------------


def orchestratord(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.daemon", *words],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_check_config_of_a_correct_file(write: Write) -> None:
    path = write("models: {m: {source: o/m}}\n")
    done = orchestratord("check-config", "--config", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: correct, 1 models\n", "")
    done = orchestratord("check-config", "--json", ORCH_CONFIG=str(path))
    assert (done.returncode, json.loads(done.stdout)) == (0, {"problems": []})


def test_check_config_of_a_wrong_one(write: Write) -> None:
    path = write("lisen: {}\nmodels: {m: {source: /nowhere}}\n")
    done = orchestratord("check-config", "-c", str(path))
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines() == [f"{path}:1:1: lisen: unknown setting; did you mean 'listen'?", "1 problem"]
    done = orchestratord("check-config", "-c", str(path), "--json")
    assert (done.returncode, done.stderr) == (78, "")
    assert json.loads(done.stdout) == {"problems": [{"where": f"{path}:1:1", "what": "lisen: unknown setting; did you mean 'listen'?"}]}


def test_check_config_looks_for_the_model_folders(write: Write) -> None:
    done = orchestratord("check-config", "-c", str(write("models: {m: {source: /nowhere}}\n")))
    assert done.returncode == 78
    assert "a.yaml:1:14: models.m.source: there is no folder '/nowhere'" in done.stderr


def test_serve_with_a_wrong_config_is_exit_78_and_starts_nothing(tmp_path: Path) -> None:
    done = orchestratord("serve", ORCH_LISTEN__PORT="x", ORCH_DIRS__STATE=str(tmp_path / "s"), ORCH_DIRS__RUNTIME=str(tmp_path / "r"))
    assert done.returncode == 78
    assert done.stderr.startswith("orchestratord: ORCH_LISTEN__PORT: listen.port: 'x': input should be a valid integer")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_file_that_this_user_may_not_read(tmp_path: Path) -> None:
    # The modules are loaded before the user changes: the checkout may be one that only root can read.
    imports = "import os, sys; from pathlib import Path; from orchestrator.config_errors import load"
    program = f"{imports}; os.setuid(65534); load([Path(sys.argv[1])], {{}})"
    path = tmp_path / "a.yaml"
    path.write_text("log: {}\n")
    path.chmod(0)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "ConfigError: " in done.stderr
    assert f"{path}: cannot be read: [Errno 13] Permission denied" in done.stderr


def test_the_schema_knows_every_setting_and_takes_a_model_without_its_name() -> None:
    done = orchestratord("schema")
    assert done.returncode == 0
    schema: dict[str, Any] = json.loads(done.stdout)
    assert schema == settings.schema()
    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["additionalProperties"] is False
    spec = schema["$defs"]["ModelSpec"]
    assert spec["required"] == ["source"]
    assert spec["additionalProperties"] is False
    assert all(field["description"] for field in spec["properties"].values())


def test_the_shipped_config_is_correct_and_fits_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import yaml

    for path in sorted((ROOT / "config").glob("*.yaml")):
        jsonschema.validate(yaml.safe_load(path.read_text()) or {}, settings.schema())


def test_the_shipped_configs_load() -> None:
    paths = sorted((ROOT / "config").glob("*.yaml"))
    assert paths
    for path in paths:
        load([path], {})
