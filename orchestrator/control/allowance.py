"""The arithmetic of a key's limits: how long until it may, when a day and a month end. Pure: the clock is passed in.

A limit of N a minute is a token bucket (GCRA, ITU-T I.371): it holds N and fills at N / 60 a second. So N may come at once, then one as
each 60 / N s pass; over any t seconds that is never more than N + N * t / 60. All that is kept of it is `full_at`, the moment at which it
will be full again. A cost that is known only at the end (tokens) is taken then, and may leave the bucket below nothing: that is waited out.
Days and months are those of UTC, whose days have 86,400 s.
"""

from datetime import UTC, date, datetime, timedelta

MINUTE_S = 60.0
DAY_S = 86_400
EPOCH = date(1970, 1, 1)
NEVER_USED = float("-inf")  # the `full_at` of a bucket that is full
ROUNDING = 0.01  # of one: sums of many 60 / N are not exact, and the last of N at once would be refused


def wait_s(full_at: float, now: float, per_minute: int) -> float:
    """Until it holds one; 0.0 where it does."""
    wait = full_at - now - MINUTE_S * (per_minute - 1) / per_minute
    return wait if wait > MINUTE_S * ROUNDING / per_minute else 0.0


def taken(full_at: float, now: float, per_minute: int, amount: int) -> float:
    """`full_at` when `amount` was taken, whether it was there or not."""
    return max(full_at, now) + MINUTE_S * amount / per_minute


def day(at: float) -> int:
    """Days from the epoch to the one that `at` (seconds since then) is in."""
    return int(at // DAY_S)


def month_begins(at: float) -> int:
    """The first day of its month."""
    return (_date(at).replace(day=1) - EPOCH).days


def month_ends(at: float) -> float:
    """Seconds since the epoch, of the first moment that is no longer in its month."""
    following = _date(at).replace(day=28) + timedelta(days=4)  # the 28th and four days are in the next month, whatever this one's length
    return float((following.replace(day=1) - EPOCH).days * DAY_S)


def name_of(day: int) -> str:
    """2027-01-31."""
    return (EPOCH + timedelta(days=day)).isoformat()


def _date(at: float) -> date:
    return datetime.fromtimestamp(at, UTC).date()
