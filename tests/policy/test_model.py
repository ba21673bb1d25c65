"""The spec: every bad value is refused, and the message names the field, the value and the mend.

The owned arguments matter most: an engine whose port or memory somebody else sets is out of the daemon's hands.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.policy.model import NAME, OWNED_ARGS, OWNED_ENV, TUNABLE_ENV, ModelSpec, check_name, owned_flag, slug
from orchestrator.policy.units import GIB, MIB

look = settings(max_examples=100, derandomize=True, deadline=None)


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": "m", "source": "org/m", **fields})


def refusal(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    return "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in caught.value.errors())


@pytest.mark.parametrize("name", ["m", "7", "Qwen/Qwen2.5-7B-Instruct", "a.b_c:d@e+f-g", "a/b/c", "x" * 128])
def test_good_names(name: str) -> None:
    assert spec(name=name).name == name
    assert spec(aliases=[name + "x"] if len(name) < 128 else [name]).aliases


@pytest.mark.parametrize(
    "name", ["", "-m", ".m", "/m", "m/", "a//b", "a/../b", "a/-b", "a b", "ä", "a\n", "a\0", "x" * 129, "a?b", "a%2Fb"]
)
def test_bad_names_and_aliases(name: str) -> None:
    assert "is not a name: use 1 to 128 letters" in refusal(name=name)
    assert "is not a name: use 1 to 128 letters" in refusal(aliases=["fine", name])
    assert repr(name) in refusal(name=name)


@look
@given(st.from_regex(NAME, fullmatch=True))
def test_a_good_name_has_no_part_that_leads_out_of_a_folder(name: str) -> None:
    assert check_name(name) == name
    assert not {"", ".", ".."} & set(name.split("/"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"aliases": ["a", "a"]}, "an alias is given twice: remove one"),
        ({"aliases": ["a", "m"]}, "'m' is already the name: remove it"),
        ({"adapters": {"m": "org/x"}}, "adapters: 'm' is a name of the model itself: an adapter needs one of its own"),
        ({"adapters": {"b": "org/x"}, "aliases": ["b"]}, "adapters: 'b' is a name of the model itself"),
        ({"adapters": {"b": " "}}, "'b' has no source: name its folder or its Hub id"),
        ({"adapters": {"a b": "org/x"}}, "'a b' is not a name"),
        ({"args": ["--lora-modules", "a=b"]}, "use a model's field adapters instead"),
        ({"source": ""}, "source: String should have at least 1 character"),
        ({"nmae": "typo"}, "nmae: Extra inputs are not permitted"),
        ({"gpus": []}, "write auto, or at least one index or UUID"),
        ({"gpus": [0, 0]}, "a GPU is named twice: remove one"),
        ({"gpus": [0, "0"]}, "a GPU is named twice: remove one"),
        ({"gpus": ["GPU-a", "GPU-a"]}, "a GPU is named twice: remove one"),
        ({"gpus": [-1]}, "greater than or equal to 0"),
        ({"gpus": [True]}, "gpus"),
        ({"gpus": [0.0]}, "gpus"),
        ({"gpus": "all"}, "gpus"),
        ({"gpus": 0}, "gpus"),
        ({"gpus": [0], "tensor_parallel_size": 2}, "1 named, but tensor_parallel_size is 2: name at least as many"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 65}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 1.5}, "tensor_parallel_size"),
        ({"args": ["serve"]}, "'serve' is not a flag"),
        ({"args": ["org/other", "--enforce-eager"]}, "'org/other' is not a flag"),
        ({"args": "--enforce-eager"}, "args"),
        ({"args": [1]}, "args.0"),
        ({"env": {"1A": "x"}}, "'1A' is not the name of an environment variable"),
        ({"env": {"A B": "x"}}, "'A B' is not the name"),
        ({"env": {"A=B": "x"}}, "'A=B' is not the name"),
        ({"env": {"": "x"}}, "'' is not the name"),
        ({"env": {"A": 1}}, "env.A"),
        ({"kv_floor": "2GiB", "kv_ceiling": "1GiB"}, r"kv_floor (2048MiB) is above kv_ceiling (1024MiB): lower the floor"),
        ({"kv_floor": "12 GB"}, "'12 GB' is ambiguous (decimal or binary?): write 12GiB"),
        ({"kv_floor": -1}, "kv_floor: Value error, -1 is not a size"),
        ({"kv_floor": 1e99}, "1e+99 is not a size"),
        ({"kv_floor": "1e99"}, "'1e99' is not a size"),
        ({"kv_ceiling": float("nan")}, "nan is not a size"),
        ({"kv_ceiling": float("inf")}, "inf is not a size"),
        ({"kv_ceiling": 10**400}, "is not a size"),
        ({"kv_ceiling": True}, "True is not a size"),
        ({"kv_weight": 0}, "kv_weight: Input should be greater than 0"),
        ({"kv_weight": -1}, "kv_weight"),
        ({"kv_weight": 1001}, "kv_weight"),
        ({"kv_weight": float("nan")}, "kv_weight: Input should be a finite number"),
        ({"kv_weight": float("inf")}, "kv_weight"),
        ({"priority": 9}, "priority: Input should be less than or equal to 8"),
        ({"priority": -9}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"idle_timeout": 0}, "0 is not a duration"),
        ({"idle_timeout": "-1s"}, "'-1s' is not a duration"),
        ({"start_timeout": None}, "None is not a duration"),
        ({"start_timeout": float("nan")}, "nan is not a duration"),
        ({"start_timeout": "soon"}, "'soon' is not a duration: write it like 90s"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_queue": -1}, "max_queue"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_bad_values(fields: dict[str, Any], says: str) -> None:
    assert says in refusal(**fields)


@pytest.mark.parametrize(("given", "seconds"), [(0, 0.0), (0.0, 0.0), ("0", 0.0), ("0s", 0.0), ("0.0", 0.0), ("2m", 120.0), (1.5, 1.5)])
def test_a_minimum_residency_may_be_none(given: object, seconds: float) -> None:
    assert spec(min_residency=given).min_residency == seconds


@pytest.mark.parametrize("given", [False, None, "", "-1", -1, "00:10", [], {}])
def test_what_is_no_minimum_residency(given: object) -> None:
    with pytest.raises(ValidationError, match="min_residency"):
        spec(min_residency=given)


@pytest.mark.parametrize("flag", OWNED_ARGS)
def test_owned_arguments_in_every_spelling(flag: str) -> None:
    instead = OWNED_ARGS[flag]
    spellings = {flag, f"{flag}=1"} | (
        {f"--{flag[2:].replace('-', '_')}", f"--{flag[2:].replace('-', '_')}=1"} if flag[:2] == "--" else set()
    )
    for spelling in spellings:
        assert owned_flag(spelling) == flag
        for args in ([spelling, "1"], ["--enforce-eager", spelling]):
            said = refusal(args=args)
            assert f"{flag} belongs to the daemon: remove it" in said
            assert instead.removeprefix("- ") in said


@pytest.mark.parametrize(
    ("arg", "flag"),
    [
        ("--tensor-parallel", "--tensor-parallel-size"),
        ("--gpu_memory=0.5", "--gpu-memory-utilization"),
        ("--served", "--served-model-name"),
    ],
)
def test_owned_arguments_may_not_be_shortened_either(arg: str, flag: str) -> None:
    assert owned_flag(arg) == flag


@pytest.mark.parametrize("arg", ["--max-model-len=8k", "--port-range", "port", "8000", "-O3", "--enforce-eager", "--modelx", "-", ""])
def test_other_arguments_are_passed(arg: str) -> None:
    assert owned_flag(arg) is None
    assert spec(args=["--dtype", arg]).args == ("--dtype", arg)


@pytest.mark.parametrize("name", [*OWNED_ENV, "KVCACHED_IPC_NAME", "KVCACHED_GPU_UTILIZATION", "ENABLE_KVCACHED_X"])
def test_owned_environment(name: str) -> None:
    assert f"{name} belongs to the daemon: remove it" in refusal(env={name: "1"})


@pytest.mark.parametrize("name", [*TUNABLE_ENV, "VLLM_USE_V1", "HF_HOME", "_x1", "MY_KVCACHED_X"])
def test_other_environment_is_passed(name: str) -> None:
    assert spec(env={name: "1"}).env == {name: "1"}


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        ({"kv_floor": "1GiB", "kv_ceiling": "1GiB"}, "kv_floor", GIB),
        ({"kv_ceiling": "0.5G"}, "kv_ceiling", 512 * MIB),
        ({"priority": -8}, "priority", -8),
        ({"priority": 8}, "priority", 8),
        ({"kv_weight": 1000}, "kv_weight", 1000.0),
        ({"gpus": ["GPU-a", 1]}, "gpus", ("GPU-a", 1)),
        ({"gpus": [0, 1], "tensor_parallel_size": 2}, "gpus", (0, 1)),
        ({"idle_timeout": None}, "idle_timeout", None),
        ({"idle_timeout": "1h30m"}, "idle_timeout", 5400.0),
        ({"max_queue": 0}, "max_queue", 0),
    ],
)
def test_good_values(fields: dict[str, Any], field: str, value: object) -> None:
    assert getattr(spec(**fields), field) == value


def test_a_spec_comes_back_from_json_as_it_was() -> None:
    full = spec(
        gpus=[1, "GPU-a"], args=["--dtype", "auto"], env={"A": "1"}, kv_floor="1GiB", kv_ceiling="1.1GiB", idle_timeout=None, pinned=True
    )
    assert ModelSpec.model_validate_json(full.model_dump_json()) == full
    assert ModelSpec.model_validate_json(full.model_dump_json()).launch_key() == full.launch_key()


CHANGES: dict[str, Any] = {
    "name": "n",
    "source": "org/n",
    "aliases": ["a"],
    "adapters": {"sql": "org/sql"},
    "gpus": [1],
    "tensor_parallel_size": 2,
    "args": ["--enforce-eager"],
    "env": {"A": "1"},
    "engine": "other",
    "kv_floor": "1GiB",
    "kv_ceiling": "2GiB",
    "kv_weight": 2.0,
    "priority": 1,
    "pinned": True,
    "preload": True,
    "sleep_timeout": 60,
    "sleep_level": 0,
    "min_residency": 60,
    "idle_timeout": 60,
    "start_timeout": 60,
    "idle_trim": 60,
    "prefix_cache_tokens": 1,
    "max_concurrency": 1,
    "max_queue": 1,
}
RESTARTS = {
    "name", "source", "aliases", "adapters", "gpus", "tensor_parallel_size", "args", "env", "engine", "prefix_cache_tokens", "sleep_level",
}  # fmt: skip
WEIGHS = {"source", "adapters", "tensor_parallel_size", "args", "env", "engine"}


def test_which_changes_need_a_restart_and_which_a_new_footprint() -> None:
    assert CHANGES.keys() == ModelSpec.model_fields.keys(), "a new field: say here whether a change of it needs a restart"
    base = spec()
    changed = {field: base.launch_key() != spec(**{field: value}).launch_key() for field, value in CHANGES.items()}
    assert {field for field, differs in changed.items() if differs} == RESTARTS
    weighed = {field: base.footprint_key() != spec(**{field: value}).footprint_key() for field, value in CHANGES.items()}
    assert {field for field, differs in weighed.items() if differs} == WEIGHS
    assert spec(env={"A": "1", "B": "2"}).launch_key() == spec(env={"B": "2", "A": "1"}).launch_key()


@pytest.mark.parametrize(
    ("args", "value"),
    [
        ([], None),
        (["--max-model-len", "8k"], "8k"),
        (["--max_model_len=8k"], "8k"),
        (["--max-model-len=a=b"], "a=b"),
        (["--max-model-len"], ""),
        (["--max-model-len", "--enforce-eager"], ""),
        (["--max-model-length", "8k"], None),
        (["--dtype", "auto", "--max-model-len", "9"], "9"),
        (["--max-model-len", "9", "--max_model_len=10"], "10"),  # argparse takes the last
    ],
)
def test_a_flag_is_found_in_every_spelling(args: list[str], value: str | None) -> None:
    assert spec(args=args).flag("--max-model-len") == value


@look
@given(st.text(max_size=60))
def test_a_slug_is_fit_for_a_file_name(name: str) -> None:
    assert 1 <= len(slug(name)) <= 20
    assert set(slug(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert slug(name)[0] != "-" != slug(name)[-1]


@pytest.mark.parametrize(("name", "text"), [("Qwen/Qwen2.5-7B", "qwen-qwen2-5-7b"), ("___", "model"), ("a" * 19 + "/b", "a" * 19)])
def test_slugs(name: str, text: str) -> None:
    assert slug(name) == text
