"""The bugs that `python -m tests.policy.planted` plants, one at a time: what is changed, and what it would do to users.

Each is a slip that one could make. `before` stands exactly once in the file; `choice` says why no property can tell that it is
wrong: where it is set, the rule is a choice of ours (how much, how soon), and a table of examples that holds it is enough.
"""

from dataclasses import dataclass
from pathlib import Path

POLICY = Path("orchestrator/policy")
DIVISION, BUDGETS, DECIDE = POLICY / "division.py", POLICY / "budgets.py", POLICY / "decide.py"


@dataclass(frozen=True)
class Bug:
    name: str
    file: Path
    before: str
    after: str
    harm: str
    choice: str = ""
    also: tuple[str, str] | None = None  # a second place, where two must be wrong for anybody to notice


SAFETY = (
    # What engines may still take, and what is promised: out of memory where it is wrong.
    Bug(
        "no settle window",
        BUDGETS,
        "if now - when < SETTLE_S and size > most:",
        "if now - when < 0.0 and size > most:",
        "memory is given out that an engine may still take in the next half second: out of memory",
    ),
    Bug(
        "settle window of 0.05 s",
        BUDGETS,
        "SETTLE_S = 0.5",
        "SETTLE_S = 0.05",
        "shorter than an engine's watcher (0.1 s): as without one",
    ),
    Bug(
        "charge without what is mapped",
        BUDGETS,
        "    if pool.mapped_bytes > most:\n        most = pool.mapped_bytes\n",
        "",
        "memory that draining requests hold is given out again",
    ),
    Bug(
        "charge without reserved pages",
        BUDGETS,
        "    if pool.mapped_bytes > most:\n        most = pool.mapped_bytes\n",
        "    if pool.used_bytes > most:\n        most = pool.used_bytes\n",
        "an engine's reserved pages are given out to others",
    ),
    Bug(
        "a zeroed segment is believed",
        BUDGETS,
        "most = pool.limit_bytes if pool.limit_bytes > 0 else memory.limit_bytes",
        "most = pool.limit_bytes",
        "an engine whose segment was made anew goes on with its old limit, which is given to others",
    ),
    Bug(
        "a zeroed segment's limit is credited at the write",
        BUDGETS,
        "        if last > new:  #",
        "        if last > new > last:  #",
        "an engine that has not seen the limit which replaces the 0 takes what was given to others",
    ),
    Bug(
        "a grow is not remembered beside a zeroed segment",
        BUDGETS,
        "memory[key].moved(now, new, reason, replaced)",
        "memory[key].moved(now, last, reason, replaced)",
        "of an engine whose segment is zeroed just after a grow, the smaller limit before it is charged",
    ),
    Bug(
        "a shrink is credited at the write",
        BUDGETS,
        "                shrinks.append(shrunk)\n",
        "                shrinks.append(shrunk)\n                for gpu in pool.gpus:\n                    left[gpu] += limit - new\n",
        "a neighbour grows before the engine has seen its smaller limit: out of memory",
    ),
    Bug(
        "a shrink is not remembered",
        BUDGETS,
        "(*memory[key].replaced, (now, limit))",
        "memory[key].replaced",
        "the next look, perhaps 20 ms later, gives it out",
    ),
    Bug(
        "only the last shrink is remembered",
        BUDGETS,
        "(*memory[key].replaced, (now, limit))",
        "((now, limit),)",
        "two shrinks in one settle window: the larger of the two limits is forgotten",
    ),
    Bug(
        "a grow forgets the shrink before it",
        BUDGETS,
        "memory[key].moved(now, new, reason, replaced)",
        "memory[key].moved(now, new, reason, ())",
        "what a grown engine may still hold of its former, larger limit is given out",
    ),
    Bug(
        "grows are not charged",
        BUDGETS,
        "            left[gpu] -= max(0, new - charges[key])\n",
        "            pass\n",
        "two hungry engines get the same memory",
    ),
    Bug(
        "free is the most over its GPUs",
        BUDGETS,
        "free = min([left[gpu] for gpu in pool.gpus])",
        "free = max([left[gpu] for gpu in pool.gpus])",
        "a tensor-parallel engine grows through the reserve of its tightest GPU",
    ),
    Bug(
        "a grow is rounded up",
        BUDGETS,
        "pool.down(charges[key] + max(0, free))",
        "pool.up(charges[key] + max(0, free))",
        "up to a bundle a grow that is not there",
    ),
    Bug(
        "grows are written before shrinks",
        BUDGETS,
        "(*shrinks, *grows)",
        "(*grows, *shrinks)",
        "a daemon that dies between two writes leaves more promised than there is",
    ),
    Bug(
        "frozen pools are not charged",
        BUDGETS,
        "                    rooms[gpu] -= size\n",
        "                    left[gpu] += size\n",
        "what an engine over an unreadable GPU may take on the others is given away",
    ),
    Bug(
        "frozen pools leave their room to others",
        BUDGETS,
        "                    rooms[gpu] -= size\n",
        "                    pass\n",
        "limits of the neighbours of an engine over an unreadable GPU add up to more than the card",
    ),
    Bug(
        "unread pools are forgotten",
        BUDGETS,
        "(*shrinks, *grows), memory, tuple",
        "(*shrinks, *grows), {pool.launch_id: memory[pool.launch_id] for pool in known}, tuple",
        "a GPU that is away for a moment makes young shrinks forgotten, and peaks",
    ),
    Bug(
        "the ceiling is forgotten",
        DIVISION,
        "most = max(bundle, self.down(self.ceiling_bytes))",
        "most = 1 << 50",
        "limits above an engine's start-up total, where kvcached corrupts its KV",
    ),
    Bug(
        "the start-up total is forgotten",
        DECIDE,
        "else min(capacity, spec.kv_ceiling)",
        "else spec.kv_ceiling",
        "a kv_ceiling above an engine's start-up total: kvcached corrupts its KV",
    ),
    Bug(
        "floors that do not fit are given all the same",
        DIVISION,
        "    if sum(given) <= amount:\n        return given, []\n    given = [pool.bundle_bytes",
        "    if sum(given) > -1:\n        return given, []\n    given = [pool.bundle_bytes",
        "limits sum to more than the card, and nobody says so",
    ),
    Bug(
        "floors that do not fit go over what is left",
        DIVISION,
        "            if more <= left:\n                given[at] += more",
        "            if left > 0:\n                given[at] += more",
        "the last floor that is given goes through the reserve",
    ),
    Bug(
        "held memory is promised to others",
        DIVISION,
        "    while heavy and len(heavy) < len(light):",
        "    while heavy and not heavy:",
        "limits count on memory that a draining engine still holds: use goes through the reserve",
    ),
    Bug(
        "TP takes the largest share",
        BUDGETS,
        "if size < target.get(key, size + 1):",
        "if size > target.get(key, -1):",
        "a tensor-parallel engine's limit is more than its tightest GPU has",
    ),
    Bug(
        "the second pass ignores what wide pools hold",
        BUDGETS,
        "in others], gpu in pressed, held)",
        "in others], gpu in pressed)",
        "neighbours of a draining tensor-parallel engine count on what it still holds",
    ),
    Bug(
        "slow shrink under pressure",
        BUDGETS,
        "if pressure or pool.limit_bytes > pool.most:",
        "if pool.limit_bytes > pool.most:",
        "limits yield to a foreign process only over seconds: out of memory for one of the two",
    ),
    Bug(
        "a limit falls below one bundle",
        BUDGETS,
        "        return max(target, pool.bundle_bytes)\n",
        "        return max(target - pool.bundle_bytes, 0)\n",
        "an engine ignores such a limit, or stalls for ever",
    ),
    Bug(
        "claims are not taken from the pool memory",
        DECIDE,
        "- reserve_bytes(gpu, rules) - line.claimed(uuid)\n",
        "- reserve_bytes(gpu, rules)\n",
        "KV grows into what a start was promised: the start runs out of memory",
    ),
    Bug(
        "the reserve is not taken from the pool memory",
        DECIDE,
        "- reserve_bytes(gpu, rules) - line.claimed(uuid)\n",
        "- line.claimed(uuid)\n",
        "KV grows into what activations and other processes need",
    ),
    Bug(
        "an old reading decides",
        DECIDE,
        "        if gpu.error is None  # an old reading decides nothing",
        "        if gpu.total_bytes  # an old reading decides nothing",
        "limits move on figures of a driver that hangs",
    ),
)

FAIRNESS = (
    # Who gets what there is.
    Bug(
        "no second pass",
        BUDGETS,
        "        if leaves:\n",
        "        if leaves and not leaves:\n",
        "what a tensor-parallel engine can not use on its roomy GPU lies there, while others are hungry",
    ),
    Bug(
        "left-over bundles are lost",
        DIVISION,
        "    if pressure:\n        _hand_out(",
        "    if pressure and not pressure:\n        _hand_out(",
        "a hungry engine waits beside a free bundle",
    ),
    Bug(
        "water filling keeps the remainder",
        DIVISION,
        "        left -= got\n        weight -= share\n",
        "        left -= left * share / weight\n        weight -= share\n",
        "what one does not need goes to nobody",
    ),
    Bug(
        "weight is inverted in the division",
        DIVISION,
        "    weights = [pool.weight for pool in pools]\n",
        "    weights = [1 / pool.weight for pool in pools]\n",
        "who has priority gets least",
    ),
    Bug(
        "weight is inverted in the surplus",
        DIVISION,
        "[pool.weight if pool.busy else _taxed(pool) for pool in pools]",
        "[1 / (pool.weight if pool.busy else _taxed(pool)) for pool in pools]",
        "who has priority gets least of what nobody needs",
    ),
    Bug(
        "short floors: lightest first",
        DIVISION,
        "key=lambda at: (-pools[at].weight, pools[at].launch_id)",
        "key=lambda at: (pools[at].weight, pools[at].launch_id)",
        "where floors do not fit, the model with the least priority keeps its floor",
    ),
    Bug(
        "short floors: whole floors before running requests",
        DIVISION,
        "    for whole in (False, True):",
        "    for whole in (True,):",
        "one model's spare room stands before another's running request, which then stalls for ever",
    ),
    Bug(
        "the largest request does not raise the floor",
        DIVISION,
        "self.up(max(self.floor_bytes, self.live_bytes))",
        "self.up(self.floor_bytes)",
        "a long request stalls for ever under a limit that can not hold it",
    ),
    Bug(
        "grows serve floors last",
        BUDGETS,
        "return (pool.limit_bytes >= pool.least, -max",
        "return (pool.limit_bytes < pool.least, -max",
        "a new engine waits for its floor while a busy one takes the rest",
    ),
    Bug(
        "grows serve the least need first",
        BUDGETS,
        "pool.least, -max(0, demands",
        "pool.least, max(0, demands",
        "of two that are short, the one with less need and weight grows first",
        "which of two hungry ones takes the first bundle that comes free; both reach their share",
    ),
    Bug(
        "the order of pools decides",
        BUDGETS,
        "for pool in sorted(pools, key=_launch_id):",
        "for pool in pools:",
        "limits differ from look to look although nothing has changed",
    ),
    Bug(
        "idle tax off",
        DIVISION,
        "IDLE_TAX = 0.75",
        "IDLE_TAX = 0.0",
        "models that nobody uses keep half of the spare memory, and a burst beside them waits",
        "how much an idle model pays is a choice",
    ),
    Bug(
        "idle tax is paid out",
        DIVISION,
        "return pool.weight * (1 - IDLE_TAX",
        "return pool.weight * (1 + IDLE_TAX",
        "the longer nobody uses a model, the more memory it keeps from those that are used",
    ),
    Bug(
        "2 % are kept under pressure too",
        DIVISION,
        "room -= sum(by_demand) if pressure else sum(by_demand) + KEEP * amount",
        "room -= sum(by_demand) + KEEP * amount",
        "2 % of a card lie idle while limits are being cut",
        "what is left once every demand is met; nobody lacks it",
    ),
    Bug(
        "nothing is kept in hand",
        DIVISION,
        "KEEP = 0.02",
        "KEEP = 0.0",
        "each burst waits for somebody's shrink: half a second and more",
    ),
)

DEMAND = (
    # What a pool is thought to need.
    Bug(
        "demand forgets queued bytes",
        BUDGETS,
        " + pool.queued_bytes\n",
        "\n",
        "requests wait for memory that nobody asks for on their behalf",
    ),
    Bug(
        "demand ignores the growth rate",
        BUDGETS,
        "memory.rate * LOOK_S, ",
        "",
        "an engine that grows fast runs into its limit again and again, and its requests are preempted",
    ),
    Bug("no room for the starved", BUDGETS, "used if starved else used / 4", "used / 4", "a burst climbs by quarters, and waits at each"),
    Bug(
        "the growth rate never decays",
        BUDGETS,
        "if passed > 0 and (rate or used > before.used_bytes):",
        "if passed > 0 and used > before.used_bytes:",
        "one burst is taken for growth as long as requests run, and others go short",
    ),
    Bug(
        "a peak never decays",
        BUDGETS,
        "slow *= math.exp(-passed / SLOW_TAU_S) if passed > 0 else 1.0",
        "slow *= 1.0",
        "memory that one burst took is never lent again",
    ),
    Bug(
        "a peak is forgotten at once",
        BUDGETS,
        "        slow if slow > used else float(used),\n        used,",
        "        float(used),\n        used,",
        "memory goes to the neighbour between two requests, and is missing for the second",
    ),
)

CALM = (
    # Moves that nothing forces, and those that something does.
    Bug(
        "the dead band holds urgent grows",
        BUDGETS,
        "(not urgent and _too_little(",
        "(_too_little(",
        "a starved engine waits for the cool-down",
    ),
    Bug("no cool-down", BUDGETS, "now - memory.moved_at < COOL_DOWN_S or ", "", "limits are written at every look, fifty times a second"),
    Bug(
        "no dead band",
        BUDGETS,
        "gap < max(pool.bundle_bytes, DEAD_BAND * pool.most)",
        "gap < pool.bundle_bytes",
        "limits are written for a thousandth of the card",
    ),
    Bug(
        "the whole gap at once where nothing presses",
        BUDGETS,
        "step = max(pool.bundle_bytes, pool.down(gap / 8))",
        "step = pool.up(gap)",
        "a model that was idle for a moment loses all its room, and gets it back by and by",
    ),
)

UPKEEP = (
    # What is asked of engines that live.
    Bug(
        "a busy engine is trimmed",
        DECIDE,
        "before is None or pool.busy or",
        "before is None or",
        "a running model loses its prefix cache",
        also=("idle_s=0.0 if traffic.in_flight + traffic.waiting else max(0.0, idle_s)", "idle_s=max(0.0, idle_s)"),
    ),
    Bug(
        "trimmed again and again",
        DECIDE,
        " and before.trimmed_at < snapshot.now - pool.idle_s:",
        ":",
        "an idle engine is interrupted at every look",
    ),
    Bug(
        "no trim on a pressed GPU",
        DECIDE,
        "after_s = PRESSED_TRIM_S if pressed else",
        "after_s = None if pressed else",
        "idle engines keep their prefix caches while others lack memory",
    ),
    Bug(
        "pressure does not hasten the trim",
        DECIDE,
        "after_s = PRESSED_TRIM_S if pressed else model.spec.idle_trim",
        "after_s = model.spec.idle_trim",
        "idle engines keep what others lack for as long as ever",
        "how soon an idle engine gives back is a choice",
    ),
    Bug(
        "an engine that does not serve is trimmed",
        DECIDE,
        " or instances[pool.model].state is not State.READY:\n            continue",
        ":\n            continue",
        "a start is interrupted in its checks, or an end",
    ),
    Bug(
        "the segment of an engine that does not serve is made anew",
        DECIDE,
        "if instance.state is State.READY and seen is not None and",
        "if seen is not None and",
        "a segment that its engine is removing comes back, and stays for ever",
    ),
    Bug(
        "a segment is made before its engine is ready",
        DECIDE,
        "if instance.state is State.READY and seen is not None and seen.ready and",
        "if instance.state is State.READY and seen is not None and",
        "a segment without an engine's word: a phantom pool",
    ),
    Bug(
        "a lost segment stays lost",
        DECIDE,
        "            actions.append(Repair(",
        "            list(actions).append(Repair(",
        "limits of that engine are written nowhere, for as long as it lives",
    ),
)

BUGS = (*SAFETY, *FAIRNESS, *DEMAND, *CALM, *UPKEEP)
