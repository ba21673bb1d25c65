"""What is looked at before an experiment changes anything: whether it can be done here, and who else would notice."""

from typing import TYPE_CHECKING, Any

from orchestrator.experiments import static_engine
from orchestrator.experiments.trouble import Trouble
from orchestrator.policy.units import show_bytes

if TYPE_CHECKING:
    from orchestrator.experiments.house import House

Json = dict[str, Any]


def others(house: "House") -> list[str]:
    """Other models that share these GPUs, and what they do now."""
    here = {gpu["uuid"] for gpu in house.gpus}
    found = []
    for name, model in house.before.items():
        engine = model.get("engine")
        if name not in house.names and engine and here & set(engine["gpus"]):
            busy = int(model["in_flight"]) + int(model["waiting"])
            found.append(f"{name} ({model['state']}{f', {busy} requests now' if busy else ''})")
    return found


def busy(house: "House") -> list[str]:
    """Requests of others for the models of the experiment."""
    counts = {name: int(house.before[name]["in_flight"]) + int(house.before[name]["waiting"]) for name in house.names}
    return [f"{name} has {count} request{'s' if count > 1 else ''} of others" for name, count in counts.items() if count]


def makes_room(house: "House") -> list[str]:
    """What loading the models would do to others: `big sleeps`."""
    steps = [step for name in house.names for step in house.plan(name)["steps"]]
    verbs = {"sleep": "sleeps", "stop": "stops"}
    return list(dict.fromkeys(f"{s['model']} {verbs[s['what']]}" for s in steps if s["what"] in verbs and s["model"] not in house.names))


def check_fits(house: "House", share: float) -> None:
    """Raises Trouble where static engines with `share` of each GPU would not start beside what stays there."""
    engines = [engine for name in house.names if (engine := house.before[name].get("engine"))]
    room = []  # of each GPU: its total, and what is free of it without the models of the experiment
    for one in house.cards.read():
        if one.uuid in {gpu["uuid"] for gpu in house.gpus}:
            ours = sum(int(engine["gpu_bytes"]) // len(engine["gpus"]) for engine in engines if one.uuid in engine["gpus"])
            room.append((one.total_bytes, min(one.total_bytes, one.free_bytes + ours)))
    needed = max(int(house.before[name]["spec"]["tensor_parallel_size"]) for name in house.names)
    room.sort(key=lambda each: each[1] / each[0])
    total, free = room[-min(needed, len(room))]  # the tightest of those that it would be on
    if share * total <= free:
        return
    fits = int(100 * free / total) / 100
    stays = "".join(f"\n  {other}" for other in others(house))
    raise Trouble(
        f"a static pool of {share:.0%} ({show_bytes(share * total)}) does not fit: others hold {show_bytes(total - free)} of"
        f" {show_bytes(total)}{stays}",
        [f"give it less with --static-utilization {fits:g}", "or make room first: `orchestratorctl unload NAME`"],
    )


def check_python(house: "House") -> None:
    """Raises Trouble where there is no Python to start a static engine with."""
    for name in house.names:
        static_engine.check_python(house.venv(str(house.before[name]["spec"]["engine"])))


def check_names(house: "House") -> None:
    """Raises Trouble, or the client's own error where the daemon knows no such model."""
    if twice := [name for name in house.names if house.names.count(name) > 1]:
        raise Trouble(f"{twice[0]} is named twice: name each model once")
    for name in house.names:
        if name not in house.before:
            house.model(name)  # its refusal says so, in the daemon's words; or it is an alias
            raise Trouble(f"{name!r} is another name of a model: use the one that `orchestratorctl ls` shows")
        if house.before[name].get("held"):
            raise Trouble(f"{name} was stopped by an operator: `orchestratorctl start {name}` first")


def gpus_of(house: "House") -> list[Json]:
    """Those that the models are on, or may be on. Raises Trouble where there is none."""
    all_of_them = list(house.status["gpus"])
    if not all_of_them:
        raise Trouble("the daemon sees no GPU")
    wanted: set[str] = set()
    for name in house.names:
        model = house.before[name]
        spec, engine = model["spec"], model.get("engine")
        if engine:
            wanted |= set(engine["gpus"])
        elif spec["gpus"] != "auto":
            wanted |= {gpu["uuid"] for gpu in all_of_them if gpu["index"] in spec["gpus"] or gpu["uuid"] in spec["gpus"]}
        else:
            return all_of_them
    return [gpu for gpu in all_of_them if gpu["uuid"] in wanted]
