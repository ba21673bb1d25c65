"""Who goes, in tables: each rung of the ladder, each thing that protects, what is said where nobody goes, and who takes turns."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.policy.residency import Eviction, Refusal, choose, over_host_budget, rather_stops
from orchestrator.policy.resident import Aging, Resident, Waiter, goes_at, loss_s, turn_s
from orchestrator.policy.units import GIB

NOW = 10_000.0
PLENTY = 500 * GIB
BIG_ROOM = {"g0": 0, "g1": 0}


SIZES = {"held_bytes": 16, "sleep_frees_bytes": 15, "host_bytes": 15, "host_held_bytes": 0}


def engine(model: str, **fields: Any) -> Resident:
    """A 7B model's engine (H200): 16 GiB, of which 15 come back when it sleeps; idle for a minute, there for an hour."""
    gib = {key: int(fields.pop(key, size) * GIB) for key, size in SIZES.items()}
    plain = {"launch_id": f"l-{model}", "gpus": ("g0",), "since": NOW - 3600, "min_residency_s": 45.0, "last_used": NOW - 60}
    return Resident(model, **{**plain, "arrivals": 0.01, "sleep_s": 0.3, "wake_s": 0.3, "start_s": 4.0, **gib, **fields})


def sleeper(model: str, **fields: Any) -> Resident:
    return engine(model, asleep=True, **{"held_bytes": 1, "host_held_bytes": fields.get("host_bytes", 15), **fields})


def ask(need: float, *residents: Resident, host: int = PLENTY, aging: Aging | None = None, **fields: Any) -> Eviction | Refusal:
    """What `new` gets that needs so many GiB on a full GPU."""
    room, kept, priority = fields.pop("room", BIG_ROOM), fields.pop("kept", None), fields.pop("priority", 0)
    waiter = Waiter("new", int(need * GIB), fields.pop("places", (("g0",),)), fields.pop("waits_since", NOW), priority)
    assert not fields
    return choose(waiter, room, residents, aging or Aging().seen(residents), host, NOW, kept)


def went(answer: Eviction | Refusal) -> list[str]:
    """model:how, with a ! where it is asked to finish first."""
    assert isinstance(answer, Eviction), answer
    return [f"{victim.model}:{victim.how}{'!' if victim.drain else ''}" for victim in answer.victims]


@pytest.mark.parametrize(
    ("need", "residents", "gone"),
    [
        (0, [engine("a")], []),
        (10, [engine("a")], ["a:sleep"]),
        (16, [engine("a")], ["a:stop"]),  # asleep it keeps a GiB of context
        (10, [engine("a", sleep_frees_bytes=0)], ["a:stop"]),
        (10, [engine("a"), engine("b", arrivals=1.0)], ["a:sleep"]),
        (10, [engine("a", arrivals=1.0, last_used=NOW), engine("b")], ["b:sleep"]),
        (10, [engine("a", last_used=NOW - 600), engine("b", arrivals=1.0)], ["a:sleep"]),
        (10, [engine("a", priority=1), engine("b")], ["b:sleep"]),
        (10, [engine("a", wake_s=0.1), engine("b")], ["a:sleep"]),
        (10, [engine("a", sleep_frees_bytes=11), engine("b", sleep_frees_bytes=9)], ["a:sleep"]),
        (20, [engine("a"), engine("b"), engine("c", priority=1)], ["a:sleep", "b:sleep"]),
        (31, [engine("a"), engine("b", priority=1)], ["a:stop", "b:sleep"]),
        (1, [engine("a"), sleeper("z")], ["a:sleep"]),  # nobody stops while it helps that somebody sleeps
        (16, [engine("a", last_used=NOW), sleeper("z", last_used=NOW - 3600)], ["z:stop", "a:sleep"]),
        (1, [engine("a", busy=True), sleeper("z")], ["z:stop"]),
        (10, [engine("a", leaving="stop"), engine("b")], []),
        (16, [engine("a", leaving="sleep"), engine("b")], ["b:sleep"]),
        (10, [engine("new", launch_id="old"), engine("b", priority=3)], ["b:sleep"]),
        (10, [engine("a", gpus=("g1",)), engine("b", priority=3)], ["b:sleep"]),
    ],
)
def test_the_cheapest_goes_and_as_little_of_it_as_will_do(need: float, residents: list[Resident], gone: list[str]) -> None:
    assert went(ask(need, *residents)) == gone
    assert went(ask(need, *reversed(residents))) == gone


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({"sleep_s": 17.0}, "stop"),  # the first sleep of a 7B (H200), and 4 s to start it again
        ({"sleep_s": 17.0, "start_s": 41.0}, "sleep"),  # without a launch server
        ({"sleep_s": 3.7}, "sleep"),
        ({"sleep_s": 3.8}, "stop"),
        ({"sleep_s": 17.0, "sleep_frees_bytes": 0}, "stop"),
    ],
)
def test_whoever_is_back_sooner_from_a_stop_than_from_its_sleep_stops(fields: dict[str, Any], how: str) -> None:
    assert went(ask(10, engine("a", **fields))) == [f"a:{how}"]


@pytest.mark.parametrize(
    ("behind", "how"),
    [
        ([], "sleep"),
        ([(20, (("g0",),))], "sleep"),  # two asleep give 30
        ([(21, (("g0",),))], "stop"),
        ([(10, (("g0",),)), (11, (("g0",),))], "stop"),
        ([(99, (("g1",),))], "sleep"),  # somewhere else
        ([(40, (("g0",), ("g1",)))], "sleep"),  # it may go there as well: half of it counts here
        ([(42, (("g0",), ("g1",)))], "stop"),
    ],
)
def test_nobody_sleeps_where_the_next_in_line_will_have_it_stopped(behind: list[tuple[int, Any]], how: str) -> None:
    residents = engine("a"), engine("b", gpus=("g0",), priority=1)
    waiting = [Waiter(f"behind{n}", need * GIB, places, NOW) for n, (need, places) in enumerate(behind)]
    waiter = Waiter("new", 10 * GIB, (("g0",),), NOW)
    answer = choose(waiter, BIG_ROOM, residents, Aging(), PLENTY, NOW, behind=waiting)
    assert went(answer) == [f"a:{how}"]


def test_two_small_ones_do_not_go_where_one_does_nor_a_large_one_where_a_small_one_does() -> None:
    small, other, large = (
        engine("small", held_bytes=4, sleep_frees_bytes=3),
        engine("other", held_bytes=4, sleep_frees_bytes=3),
        engine("z"),
    )
    assert went(ask(2, small, engine("large", wake_s=1.0))) == ["small:sleep"]
    assert went(ask(10, small, other, large)) == ["z:sleep"]


def test_what_a_model_frees_beyond_what_lacks_makes_it_no_cheaper() -> None:
    small = engine("small", held_bytes=4, sleep_frees_bytes=3, wake_s=0.1)
    assert went(ask(2, small, engine("huge", held_bytes=70, sleep_frees_bytes=69, wake_s=1.0))) == ["small:sleep"]


def test_every_gpu_of_a_place_gets_enough_and_who_spans_them_counts_on_each() -> None:
    both, one, other = engine("both", gpus=("g0", "g1")), engine("one", wake_s=0.2), engine("other", gpus=("g1",), wake_s=0.2)
    assert went(ask(10, one, other, places=(("g0", "g1"),))) == ["one:sleep", "other:sleep"]
    assert went(ask(10, both, one, other, places=(("g0", "g1"),))) == ["both:sleep"]
    assert went(ask(10, one, other, places=(("g0", "g1"),), room={"g0": 0, "g1": 99 * GIB})) == ["one:sleep"]
    assert isinstance(ask(10, one, places=(("g0", "g1"),)), Refusal)


@pytest.mark.parametrize(
    ("residents", "room", "where", "gone"),
    [
        ([engine("a"), engine("b", gpus=("g1",))], BIG_ROOM, "g0", ["a:sleep"]),
        ([engine("a", priority=1), engine("b", gpus=("g1",))], BIG_ROOM, "g1", ["b:sleep"]),
        ([engine("a", wake_s=0), engine("b", gpus=("g1",), wake_s=0, sleep_frees_bytes=12)], BIG_ROOM, "g1", ["b:sleep"]),
        ([engine("a")], {"g0": 0, "g1": 10 * GIB}, "g1", []),
        ([engine("a", busy=True, since=0), engine("b", gpus=("g1",), priority=8)], BIG_ROOM, "g1", ["b:sleep"]),
        ([engine("a")], {"g0": 0}, "g0", ["a:sleep"]),
    ],
)
def test_of_several_places_the_cheapest(residents: list[Resident], room: dict[str, int], where: str, gone: list[str]) -> None:
    answer = ask(10, *residents, places=(("g0",), ("g1",)), room=room, waits_since=0)
    assert isinstance(answer, Eviction)
    assert (answer.gpus, went(answer)) == ((where,), gone)


@pytest.mark.parametrize(
    ("need", "residents", "reason", "retry_in", "never"),
    [
        (10, [engine("a", pinned=True)], "10.0GiB are missing: a is pinned", None, True),
        (10, [], "10.0GiB are missing: no engine of ours holds them", None, True),
        (40, [engine("a")], "40.0GiB are missing: a is not enough", None, True),
        (10, [engine("new", launch_id="old")], "10.0GiB are missing: new is not enough", None, True),
        (10, [engine("a", since=NOW - 40)], "10.0GiB are missing: a came less than 45s ago", 5.0, False),
        (10, [engine("a", busy=True)], "10.0GiB are missing: a has requests", 180.0, False),
        (10, [engine("a", arriving=True, since=NOW + 3)], "10.0GiB are missing: a is just coming", 48.0, False),
        (10, [engine("a", arriving=True, since=NOW - 99)], "10.0GiB are missing: a is just coming", 45.0, False),
        (
            40,
            [engine("b", since=NOW - 15), engine("a"), engine("c", since=NOW - 20), engine("d", since=NOW), engine("e", leaving="stop")],
            "24.0GiB are missing: a is not enough; b came less than 45s ago; c came less than 45s ago; d came less than 45s ago",
            25.0,
            False,
        ),
    ],
)
def test_why_nobody_goes_and_until_when(need: float, residents: list[Resident], reason: str, retry_in: float | None, never: bool) -> None:
    retry_at = None if retry_in is None else NOW + retry_in
    assert ask(need, *residents) == Refusal(reason, retry_at, never)


def test_retry_is_for_the_place_that_will_do_soonest() -> None:
    residents = engine("a", since=NOW - 20), engine("b", since=NOW - 30, gpus=("g1",))
    answer = ask(10, *residents, places=(("g0",), ("g1",)))
    assert answer == Refusal("10.0GiB are missing: b came less than 45s ago", NOW + 15)


def test_a_gpu_that_cannot_be_read_is_not_used_and_nothing_is_never_there() -> None:
    assert ask(10, engine("a"), room={}) == Refusal("its GPUs cannot be read")
    answer = ask(99, engine("a"), room={"g0": 0}, places=(("g0",), ("g1",)))
    assert isinstance(answer, Refusal)
    assert not answer.never


@pytest.mark.parametrize(
    ("busy", "waits", "priority", "gone"),
    [
        ({"since": NOW - 180}, 180, 0, ["a:sleep!"]),
        ({"since": NOW - 179}, 180, 0, None),
        ({"since": NOW - 180}, 179, 0, None),
        ({"since": NOW - 360, "priority": 2}, 360, 0, ["a:sleep!"]),
        ({"since": NOW - 359, "priority": 2}, 360, 0, None),
        ({"since": NOW - 90}, 90, 2, ["a:sleep!"]),
        ({"since": NOW - 45}, 45, 8, ["a:sleep!"]),  # no priority makes a turn shorter than a minimum residency
        ({"since": NOW - 720, "priority": 8}, 720, -8, ["a:sleep!"]),
        ({"since": NOW - 30, "min_residency_s": 0.0}, 30, 0, ["a:sleep!"]),
        ({"since": NOW - 29, "min_residency_s": 0.0}, 30, 0, None),
        ({"since": NOW - 999, "pinned": True}, 999, 0, None),
    ],
)
def test_a_busy_one_finishes_when_its_turn_is_over(busy: dict[str, Any], waits: float, priority: int, gone: list[str] | None) -> None:
    answer = ask(10, engine("a", busy=True, **busy), waits_since=NOW - waits, priority=priority)
    assert went(answer) == gone if gone else isinstance(answer, Refusal)


def test_nobody_is_asked_to_finish_where_idle_ones_are_enough() -> None:
    busy = engine("busy", busy=True)
    assert went(ask(15, busy, engine("idle", priority=8), waits_since=0)) == ["idle:sleep"]
    assert went(ask(16, busy, engine("idle", priority=8), waits_since=0)) == ["idle:stop"]
    assert went(ask(17, busy, engine("idle", priority=8), waits_since=0)) == ["busy:sleep!", "idle:sleep"]
    assert went(ask(17, busy, replace(busy, model="c", launch_id="c", priority=1), waits_since=0)) == ["busy:sleep!", "c:sleep!"]


def test_a_sleeper_that_requests_wait_for_stops_only_for_who_waited_a_turn() -> None:
    wanted = sleeper("z", busy=True)
    assert ask(1, wanted, waits_since=NOW - 179) == Refusal("1024MiB are missing: z has requests", NOW + 1)
    assert went(ask(1, wanted, waits_since=NOW - 180)) == ["z:stop"]


@pytest.mark.parametrize(
    ("host", "residents", "gone"),
    [
        (15, [engine("a")], ["a:sleep"]),
        (14, [engine("a")], ["a:stop"]),
        (29, [engine("a"), sleeper("z", gpus=("g1",), priority=1)], ["a:stop"]),
        (29, [engine("a"), sleeper("z", gpus=("g1",), priority=-1)], ["z:stop", "a:sleep"]),
        (29, [engine("a"), sleeper("z", gpus=("g1",), priority=-1, busy=True)], ["a:stop"]),
        (29, [engine("a"), sleeper("z", gpus=("g1",), priority=-1, pinned=True)], ["a:stop"]),
        (29, [engine("a"), engine("z", gpus=("g1",), priority=-1, leaving="sleep")], ["a:stop"]),
        (29, [engine("a"), sleeper("z", gpus=("g1",), priority=-1, leaving="stop")], ["a:sleep"]),
        (29, [engine("a"), sleeper("new", gpus=("g1",), priority=-1)], ["a:stop"]),
        (44, [engine("a"), sleeper("z"), sleeper("y", priority=-1)], ["y:stop", "a:sleep"]),
        (30, [engine("a"), engine("b", gpus=("g1",), host_held_bytes=15)], ["a:sleep"]),
        (29, [engine("a"), engine("b", gpus=("g1",), host_held_bytes=15)], ["a:stop"]),  # awake, it keeps what its sleep pinned
        (29, [engine("a"), engine("b", gpus=("g1",), host_held_bytes=15, leaving="stop")], ["a:sleep"]),
        (15, [engine("a", host_held_bytes=15)], ["a:sleep"]),
        (29, [engine("a", host_held_bytes=15), engine("b", gpus=("g1",), host_held_bytes=15)], ["a:stop"]),
    ],
)
def test_sleepers_fit_into_the_hosts_budget(host: int, residents: list[Resident], gone: list[str]) -> None:
    assert went(ask(10, *residents, host=host * GIB)) == gone


def test_a_stop_that_frees_more_than_the_sleep_it_replaces_spares_another() -> None:
    a, b = engine("a", sleep_frees_bytes=10), engine("b", sleep_frees_bytes=10, priority=1)
    assert went(ask(16, a, b)) == ["a:sleep", "b:sleep"]
    assert went(ask(16, a, b, host=15 * GIB)) == ["a:stop"]


def test_who_can_sleep_and_is_enough_is_found_before_the_host_is_counted() -> None:
    little = engine("little", sleep_frees_bytes=3, start_s=1.0)
    assert went(ask(10, little, engine("enough"), host=15 * GIB)) == ["enough:sleep"]


@pytest.mark.parametrize(
    ("budget", "gone"),
    [(45, []), (44, ["cold"]), (30, ["cold"]), (29, ["cold", "warm"]), (15, ["cold", "warm"]), (0, ["cold", "warm"])],
)
def test_over_the_hosts_budget_the_cheapest_sleepers_stop(budget: int, gone: list[str]) -> None:
    residents = [sleeper("hot", priority=2, busy=True), sleeper("cold", last_used=0), sleeper("warm"), engine("awake")]
    found = over_host_budget(residents, budget * GIB, Aging().seen(residents), NOW)
    assert [(victim.model, victim.how) for victim in found] == [(name, "stop") for name in gone]
    assert all(victim.reason == "sleepers are over the host's budget: asleep" for victim in found)


@pytest.mark.parametrize(
    ("budget", "fields", "others", "stops"),
    [
        (15, {}, [], False),
        (14, {}, [], True),  # it could never fit
        (29, {}, [sleeper("z", priority=-1)], False),  # the sleeper is cheaper: it goes first
        (29, {}, [sleeper("z", priority=1)], True),
        (29, {}, [sleeper("z", priority=-1, busy=True)], True),
        (29, {}, [engine("z", host_held_bytes=15)], True),
        (30, {}, [engine("z", host_held_bytes=15)], False),
        (29, {"host_bytes": 14, "host_held_bytes": 14}, [engine("z", host_held_bytes=15)], False),
    ],
)
def test_who_is_to_sleep_stops_where_the_host_has_no_room_that_is_cheaper(
    budget: int, fields: dict[str, Any], others: list[Resident], stops: bool
) -> None:
    residents = [engine("a", leaving="sleep", **fields), *others]
    assert rather_stops("l-a", residents, budget * GIB, Aging().seen(residents), NOW) == stops


def test_a_large_sleeper_stops_where_small_ones_would_not_do() -> None:
    residents = [sleeper("small", host_bytes=2, start_s=0.1), sleeper("large", host_bytes=60)]
    assert [v.model for v in over_host_budget(residents, 30 * GIB, Aging().seen(residents), NOW)] == ["large"]


@pytest.mark.parametrize(
    ("fields", "how", "seconds"),
    [
        ({"arrivals": 1.0, "last_used": NOW}, "stop", 4.0),
        ({"arrivals": 1 / 60, "last_used": NOW}, "stop", 4.0 * 0.632),
        ({"arrivals": 1 / 60, "last_used": NOW}, "sleep", 0.6 * 0.632),
        ({"arrivals": 1 / 60, "last_used": NOW, "sleep_s": 17.0}, "sleep", 17.3 * 0.632),
        ({"arrivals": 1.0, "last_used": NOW - 60}, "stop", 4.0 * 0.632),
        ({"arrivals": 1 / 60, "last_used": NOW - 10}, "stop", 4.0 * 0.632),
        ({"arrivals": 0.0, "last_used": NOW}, "stop", 0.04),
        ({"arrivals": 1.0, "last_used": 0}, "stop", 0.04),
        ({"arrivals": 0.0, "busy": True}, "stop", 4.0),
        ({"arrivals": 1.0, "last_used": NOW, "priority": 3}, "stop", 32.0),
        ({"arrivals": 1.0, "last_used": NOW, "priority": -1}, "sleep", 0.3),
    ],
)
def test_what_a_return_is_expected_to_cost(fields: dict[str, Any], how: Any, seconds: float) -> None:
    assert loss_s(engine("a", **fields), how, NOW) == pytest.approx(seconds, rel=1e-3)


def test_the_level_rises_with_each_eviction_and_lifts_those_used_since() -> None:
    a, b, c = (engine(name, wake_s=wake) for name, wake in (("a", 0.1), ("b", 0.2), ("c", 0.25)))
    first = ask(10, a, b, c)
    assert went(first) == ["a:sleep"]
    assert isinstance(first, Eviction)
    assert first.aging.level == pytest.approx(loss_s(a, "sleep", NOW) / 10)
    used = replace(b, last_used=NOW - 59)
    aging = first.aging.seen([used, c])
    assert (aging.of("l-b"), aging.of("l-c")) == (first.aging.level, 0.0)
    assert aging.used.keys() == {"l-b", "l-c"}
    assert went(ask(10, used, c, aging=aging)) == ["c:sleep"]  # dearer in seconds, but b was used since
    assert went(ask(10, used, c)) == ["b:sleep"]


def test_a_busy_one_is_being_used_whatever_its_last_use_says() -> None:
    busy = engine("a", busy=True)
    assert replace(Aging().seen([busy]), level=7.0).seen([busy]).of("l-a") == 7.0
    idle = engine("a")
    assert replace(Aging().seen([idle]), level=7.0).seen([idle]).of("l-a") == 0.0


def test_a_tiny_lack_does_not_make_the_level_leap() -> None:
    answer = ask(2**-20, engine("a"))
    assert isinstance(answer, Eviction)
    assert answer.aging.level == pytest.approx(answer.cost_s)


def test_the_next_in_line_sees_the_victims_leaving() -> None:
    residents = engine("a"), engine("b", sleep_frees_bytes=0, last_used=NOW)
    answer = ask(10, *residents)
    assert isinstance(answer, Eviction)
    assert answer.after(residents) == (replace(residents[0], leaving="sleep"), residents[1])
    assert went(ask(20, *answer.after(residents))) == ["b:stop"]
    assert went(ask(15, *answer.after(residents))) == []
    waking = Eviction("z", ("g0",), (), Aging()).after([sleeper("z", busy=True)])
    assert ask(1, *waking) == Refusal("1024MiB are missing: z is just coming", NOW + 180)


def test_who_waited_a_turn_keeps_its_place_for_itself() -> None:
    residents = engine("a", busy=True, since=NOW - 100), engine("b", since=NOW - 40), engine("p", pinned=True, min_residency_s=9999)
    patient, new = ask(31, *residents, waits_since=NOW - 180), ask(31, *residents, waits_since=NOW - 179)
    assert isinstance(patient, Refusal)
    assert isinstance(new, Refusal)
    assert (patient.keep, new.keep) == (("g0",), ())
    assert patient.retry_at == NOW + 80
    behind = ask(10, engine("c"), engine("d", gpus=("g1",)), kept={"g0": "big"}, places=(("g0",), ("g1",)))
    assert went(behind) == ["d:sleep"]
    assert ask(10, engine("c"), kept={"g0": "big"}) == Refusal("its GPU is kept for big: first in line")


def test_nothing_is_kept_for_who_can_never_come() -> None:
    answer = ask(99, engine("a", busy=True, since=NOW - 1), waits_since=0)
    assert answer == Refusal("99.0GiB are missing: a has requests", None, never=True)


def test_a_place_that_is_kept_is_not_called_impossible() -> None:
    answer = ask(99, engine("a"), kept={"g1": "big"}, places=(("g0",), ("g1",)))
    assert isinstance(answer, Refusal)
    assert not answer.never


def test_what_is_said_of_a_victim() -> None:
    busy = engine("b", busy=True, since=NOW - 300)
    answer = ask(50, engine("a"), busy, sleeper("z", last_used=0), engine("d"), room={"g0": 4 * GIB}, waits_since=0)
    assert isinstance(answer, Eviction)
    said = {victim.model: (victim.reason, victim.frees_bytes // GIB) for victim in answer.victims}
    assert said == {
        "a": ("makes room for new: idle for 60s", 15),
        "b": ("makes room for new: its turn is over after 300s", 15),
        "z": ("makes room for new: asleep", 1),
        "d": ("makes room for new: idle for 60s", 15),
    }


def test_who_is_first_in_line() -> None:
    waits = [Waiter("old", 1, (), NOW - 100), Waiter("high", 1, (), NOW, priority=3), Waiter("higher", 1, (), NOW, priority=4)]
    assert [waiter.model for waiter in sorted(waits, key=lambda waiter: waiter.turn)] == ["higher", "old", "high"]


def test_turns_of_two_models_are_as_their_weights() -> None:
    for level in range(-8, 9):
        resident, waiter = engine("a", priority=level), Waiter("w", 1, (("g0",),), NOW)
        other, first = engine("w"), Waiter("a", 1, (("g0",),), NOW, priority=level)
        assert turn_s(resident, waiter) / turn_s(other, first) == 2.0 ** max(-4, min(4, level))
        assert goes_at(replace(resident, busy=True), waiter, NOW) == NOW + turn_s(resident, waiter)
