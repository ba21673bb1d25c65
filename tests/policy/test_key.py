"""What a key may be: each value that cannot be is named, with its field and the mend."""

import pytest
from pydantic import ValidationError

from orchestrator.policy.key import KeySpec

NOW = 1_800_000_000.0  # 2027-01-15 08:00 UTC


def made(**fields: object) -> KeySpec:
    return KeySpec.model_validate({"name": "ci", **fields}, context={"now": NOW})


def test_defaults_bound_nothing() -> None:
    key = made()
    assert (key.models, key.priority, key.weight, key.expires) == (None, 0, 1.0, None)
    assert (key.rpm, key.tpm, key.concurrency, key.monthly_tokens) == (None, None, None, None)


@pytest.mark.parametrize("name", ["a", "A.b_c:d@e+f-1", "9", "x" * 64])
def test_names_that_are_right(name: str) -> None:
    assert made(name=name).name == name


@pytest.mark.parametrize(
    ("expires", "at"),
    [
        ("30d", NOW + 30 * 86400), ("12h", NOW + 12 * 3600), ("1h30m", NOW + 5400), ("2027-02-01", 1_801_440_000.0), (NOW + 1, NOW + 1),
        (" 90s ", NOW + 90), (None, None),
    ],
)  # fmt: skip
def test_expiry_is_a_duration_or_the_first_moment_of_a_date(expires: object, at: float | None) -> None:
    assert made(expires=expires).expires == at


def test_it_is_the_same_after_it_was_kept() -> None:
    key = made(models=["b", "a", "b"], weight=0.5, expires="30d", rpm=1)
    assert key.models == ("b", "a")
    assert KeySpec.model_validate_json(key.model_dump_json()) == key


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("name", "", "is not a name: use 1 to 64 letters, digits"),
        ("name", "a b", "'a b' is not a name"),
        ("name", "a/b", "'a/b' is not a name"),
        ("name", "x" * 65, "is not a name"),
        ("name", 5, "valid string"),
        ("models", [], "no model is in the list: name some, or leave it out for all"),
        ("models", "m", "valid tuple"),
        ("priority", 9, "less than or equal to 8"),
        ("priority", 1.5, "integer"),
        ("weight", 0, "greater than or equal to 0.01"),
        ("weight", 101, "less than or equal to 100"),
        ("weight", float("nan"), "finite"),
        ("rpm", 0, "greater than or equal to 1"),
        ("rpm", True, "integer"),
        ("tpm", "5", "integer"),
        ("concurrency", -1, "greater than or equal to 1"),
        ("monthly_tokens", 10**13, "less than or equal to 1000000000000"),
        ("expires", "soon", "'soon' is neither a duration up to 366 days nor a date: write it like 30d, 12h or 2027-01-31"),
        ("expires", "30", "neither a duration"),
        ("expires", "400d", "neither a duration"),
        ("expires", "2027-02-30", "neither a duration"),
        ("expires", "2027-01-15", "has passed"),
        ("expires", NOW, "has passed"),
        ("expires", float("inf"), "never comes"),
        ("expires", True, "neither a duration"),
        ("rps", 1, "Extra inputs"),
    ],
)
def test_values_that_cannot_be(field: str, value: object, says: str) -> None:
    with pytest.raises(ValidationError) as error:
        made(**{field: value})
    (fault,) = error.value.errors()
    assert fault["loc"][0] == field
    assert says in fault["msg"]
