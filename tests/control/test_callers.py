"""Keys in memory, with clocks of the test's own: who is let in, what stops a key, when it may again, and what is counted."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.allowance import DAY_S, day, month_begins, month_ends
from orchestrator.control.keys import Account, Keys, Required, Usage
from orchestrator.errors import Forbidden, ModelNotFound, OrchestratorError, QuotaSpent, RateLimited, Unauthorized
from orchestrator.policy.key import KeySpec, StoredKey

TODAY = 1_800_000_000.0  # 2027-01-15 08:00 UTC


class Ring:
    """Keys, and the clocks that they go by: `now` of minutes, `at` of days."""

    def __init__(self, required: Required = "auto") -> None:
        self.now, self.at = 5000.0, TODAY
        self.keys = Keys(required, lambda: self.now, lambda: self.at)

    def add(self, name: str = "ci", month_tokens: int = 0, **fields: object) -> str:
        secret = f"sk-orch-{name}"
        spec = KeySpec.model_validate({"name": name, **fields})
        self.keys.admit(StoredKey(spec, hashlib.sha256(secret.encode()).digest(), secret[:6], self.at), month_tokens)
        self.keys.ask_for_keys()
        return secret

    def account(self, **fields: object) -> Account:
        found = self.keys.caller({b"authorization": f"Bearer {self.add(**fields)}".encode()}, "")  # type: ignore[arg-type]
        assert isinstance(found, Account)
        return found

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        self.at += seconds


def refusal(account: Account, model: str = "m") -> RateLimited:
    with pytest.raises(RateLimited) as error:
        account.enter(model)
    assert error.value.status == 429
    assert error.value.retry_after_s is not None
    return error.value


# ---- who is let in ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"Bearer sk-orch-ci"), (b"authorization", b"bearer  sk-orch-ci "),
        (b"x-api-key", b"sk-orch-ci"), (b"x-api-key", b" sk-orch-ci"),
    ],
)  # fmt: skip
def test_a_key_is_known_as_openai_and_as_anthropic_send_it(header: tuple[bytes, bytes]) -> None:
    ring = Ring()
    ring.add("ci", priority=2, weight=3.0)
    caller = ring.keys.caller(dict([header]), "10.0.0.1")
    assert (caller.client, caller.priority, caller.weight, caller.metered) == ("ci", 2, 3.0, True)


def test_a_right_key_counts_beside_a_wrong_one() -> None:
    ring = Ring()
    ring.add("ci")
    assert ring.keys.caller({b"authorization": b"Bearer of-the-gateway", b"x-api-key": b"sk-orch-ci"}, "").client == "ci"


def test_whatever_is_wrong_is_refused_in_the_same_words() -> None:
    ring = Ring()
    expired, revoked = ring.add("old", expires=TODAY + 60), ring.add("gone")
    account = ring.keys.caller({b"x-api-key": revoked.encode()}, "")
    ring.pass_s(60)
    assert isinstance(account, Account)
    ring.keys.turn_away(account.key.digest)
    said = set()
    for headers in (
        {},
        {b"authorization": b""},
        {b"authorization": b"Bearer "},
        {b"authorization": b"Basic c2stb3JjaC1jaTo="},
        {b"authorization": b"Bearer sk-orch-wrong"},
        {b"authorization": f"Bearer {expired}".encode()},
        {b"authorization": f"Bearer {revoked}".encode()},
        {b"x-api-key": b"sk-orch-wrong"},
        {b"x-api-key": "sk-orch-ü".encode("latin-1")},
    ):
        with pytest.raises(Unauthorized) as error:
            ring.keys.caller(headers, "127.0.0.1")
        said.add(str(error.value))
        assert (error.value.status, error.value.code) == (401, "invalid_api_key")
    assert len(said) == 1


def test_a_key_is_valid_to_the_last_moment() -> None:
    ring = Ring()
    headers = {b"x-api-key": ring.add(expires=TODAY + 60).encode()}
    ring.pass_s(59.9)
    assert ring.keys.caller(headers, "").client == "ci"
    ring.pass_s(0.1)
    with pytest.raises(Unauthorized):
        ring.keys.caller(headers, "")


@pytest.mark.parametrize(
    ("required", "before", "after"), [("auto", "10.0.0.1", None), ("always", None, None), ("never", "10.0.0.1", "10.0.0.1")]
)
def test_who_has_no_key_is_served_as_the_setting_says(required: Required, before: str | None, after: str | None) -> None:
    ring = Ring(required)
    for expected in (before, after, after):  # without any key, with one, and when the last was revoked
        if expected is None:
            with pytest.raises(Unauthorized):
                ring.keys.caller({}, "10.0.0.1")
        else:
            caller = ring.keys.caller({}, "10.0.0.1")
            assert (caller.client, caller.metered, caller.urgency(8)) == (expected, False, 8)
        if ring.keys.account(digest := hashlib.sha256(b"sk-orch-ci").digest()) is None:
            ring.add("ci")
        else:
            ring.keys.turn_away(digest)


def test_where_keys_are_not_required_one_is_metered_all_the_same() -> None:
    ring = Ring("never")
    headers = {b"x-api-key": ring.add("ci").encode()}
    assert ring.keys.caller(headers, "").metered


# ---- what it may --------------------------------------------------------------------------------------------------------------


def test_a_key_has_its_models_and_is_told_of_no_others() -> None:
    account = Ring().account(models=["a", "b"])
    known = {"a": "a", "alias": "b", "secret": "secret"}

    def resolve(name: str) -> str:
        if name not in known:
            raise ModelNotFound(f"there is no {name}, only {', '.join(known)}")
        return known[name]

    assert [account.resolve(resolve, name) for name in ("a", "alias")] == ["a", "b"]
    assert [account.allows(name) for name in ("a", "b", "secret")] == [True, True, False]
    texts = []
    for name in ("secret", "nothing"):
        with pytest.raises(Forbidden) as error:
            account.resolve(resolve, name)
        assert (error.value.status, error.value.code, error.value.param) == (403, "model_not_allowed", "model")
        texts.append(str(error.value).replace(name, "X"))
    assert texts[0] == texts[1]  # nor whether it is there
    with pytest.raises(Forbidden):
        account.enter("secret")
    assert account.running == 0
    free = Ring().account()
    with pytest.raises(ModelNotFound):
        free.resolve(resolve, "nothing")
    assert free.resolve(resolve, "alias") == "b"


def test_a_header_may_only_lower_a_priority() -> None:
    account = Ring().account(priority=2)
    assert [account.urgency(asked) for asked in (None, 8, 2, 1, -8)] == [2, 2, 2, 1, -8]
    low = Ring().account(priority=-3)
    assert [low.urgency(asked) for asked in (None, 0, -4)] == [-3, -3, -4]


# ---- what stops it ------------------------------------------------------------------------------------------------------------


def test_requests_a_minute_and_a_refused_one_costs_nothing() -> None:
    ring = Ring()
    account = ring.account(rpm=6)
    for _ in range(6):
        account.enter("m")
        account.leave("m", None)
    for _ in range(20):
        error = refusal(account)
    assert error.retry_after_s == pytest.approx(10)
    assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
    ring.pass_s(10)
    account.enter("m")
    assert refusal(account).retry_after_s == pytest.approx(10)


def test_tokens_a_minute_are_counted_when_answers_end_and_stop_the_next_request() -> None:
    ring = Ring()
    account = ring.account(tpm=600)
    for _ in range(3):  # nobody knows yet what they will take
        account.enter("m")
    account.leave("m", Usage(300, 200))
    account.enter("m")
    account.leave("m", Usage(500, 400))
    error = refusal(account)
    assert error.type == "tokens"
    assert error.retry_after_s == pytest.approx(80.1)  # 801 are missing, and 10 come a second
    account.leave("m", None)
    account.leave("m", None)
    ring.pass_s(80.1)
    account.enter("m")


def test_requests_at_the_same_time() -> None:
    account = Ring().account(concurrency=2)
    account.enter("a")
    account.enter("b")
    assert refusal(account).retry_after_s == 1.0
    account.leave("a", None)
    account.enter("a")
    assert account.running == 2


def test_the_tokens_of_a_month_come_back_with_the_next() -> None:
    ring = Ring()
    account = ring.account(monthly_tokens=1000, month_tokens=400)
    account.enter("m")
    account.leave("m", Usage(599, 0))
    account.enter("m")
    account.leave("m", Usage(1, 50))
    error = refusal(account)
    assert isinstance(error, QuotaSpent)
    assert (error.code, error.type) == ("insufficient_quota", "insufficient_quota")
    assert error.retry_after_s == month_ends(TODAY) - TODAY
    ring.pass_s(error.retry_after_s - 1)
    refusal(account)
    ring.pass_s(1)
    account.enter("m")
    account.leave("m", Usage(999, 0))
    account.enter("m")


def test_an_answer_that_ends_in_the_next_month_is_of_that_month() -> None:
    ring = Ring()
    account = ring.account(monthly_tokens=1000, month_tokens=400)
    account.enter("m")
    ring.pass_s(month_ends(TODAY) - TODAY)
    account.leave("m", Usage(1000, 0))
    assert isinstance(refusal(account), QuotaSpent)
    assert list(ring.keys.unwritten()) == [("ci", "m", day(ring.at))]


def test_one_limit_that_stops_a_request_takes_nothing_from_the_others() -> None:
    ring = Ring()
    account = ring.account(rpm=1, tpm=60, concurrency=1, monthly_tokens=10**6)
    account.enter("m")
    refusal(account)  # concurrency
    account.leave("m", Usage(100, 0))
    for _ in range(3):
        refusal(account)
    ring.pass_s(41)  # the tokens are back; the request is not
    assert "rpm" in str(refusal(account))
    ring.pass_s(19)
    account.enter("m")
    assert account.running == 1


Steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.sampled_from("abx")),
        st.tuples(st.just("leave"), st.tuples(st.integers(0, 400), st.integers(0, 400))),
        st.tuples(st.just("pass"), st.sampled_from([0.1, 5.0, 61.0, DAY_S, 20 * DAY_S])),
    ),
    max_size=80,
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(Steps, st.integers(1, 3))
def test_whatever_comes_all_bounds_hold_and_all_that_was_let_in_is_counted(steps: list[tuple[str, object]], concurrency: int) -> None:
    ring = Ring()
    account = ring.account(models=["a", "b"], concurrency=concurrency, rpm=10, tpm=2000, monthly_tokens=5000)
    running, ended, month = list[str](), dict[tuple[str, str, int], list[int]](), [month_begins(TODAY), 0]
    for what, value in steps:
        if what == "pass":
            assert isinstance(value, float | int)
            ring.pass_s(value)
        elif what == "enter":
            if month[0] != month_begins(ring.at):
                month = [month_begins(ring.at), 0]
            refused = None
            try:
                account.enter(str(value))
            except OrchestratorError as error:
                refused = error
            assert (value == "x") == isinstance(refused, Forbidden)
            assert (value != "x" and month[1] >= 5000) == isinstance(refused, QuotaSpent)
            if refused is None:
                running.append(str(value))
            elif value != "x":
                assert refused.retry_after_s is not None
                assert refused.retry_after_s > 0
            assert account.running == len(running) <= concurrency
        elif running:
            assert isinstance(value, tuple)
            model, usage = running.pop(), Usage(*value)
            account.leave(model, usage)
            row = ended.setdefault(("ci", model, day(ring.at)), [0, 0, 0])
            row[:] = [row[0] + 1, row[1] + usage.prompt_tokens, row[2] + usage.completion_tokens]
            if month[0] != month_begins(ring.at):
                month = [month_begins(ring.at), 0]
            month[1] += sum(usage)
    assert dict(ring.keys.take_unwritten()) == ended
    assert not ring.keys.unwritten()
