"""The last time of a cron expression, held to a search minute by minute that reads the fields by itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.shared import cron
from components.shared.errors import TuneyardError

BOUNDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
ZONES = ["UTC", "Asia/Shanghai", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"]


def holds(field, value, least, most):
    """Whether a value is one of a field, asked of the value and not by listing the field."""
    for part in field.split(","):
        span, _, step = part.partition("/")
        low, _, high = span.partition("-")
        if low in "*?":
            low, high = str(least), str(most)
        elif not high:
            high = str(most) if step else low
        if int(low) <= value <= int(high) and (value - int(low)) % int(step or 1) == 0:
            return True
    return False


def shows(expression, wall):
    """Whether clocks that show `wall` show a time of the expression (robfig/cron 1.2, spec.go)."""
    fields = expression.split()
    values = (wall.minute, wall.hour, wall.day, wall.month, wall.isoweekday() % 7)
    minute, hour, day, month, weekday = (
        holds(f, v, *b) for f, v, b in zip(fields, values, BOUNDS, strict=True)
    )
    starred = any(part[0] in "*?" for field in (fields[2], fields[4]) for part in field.split(","))
    days = (day and weekday) if starred else (day or weekday)
    return minute and hour and days and month


def field(least, most, star):
    number = st.integers(least, most)
    span = st.tuples(number, number).map(lambda ends: f"{min(ends)}-{max(ends)}")
    step = st.tuples(st.one_of(st.just("*"), number.map(str), span), st.integers(1, 9)).map(
        lambda both: f"{both[0]}/{both[1]}"
    )
    part = st.one_of(number.map(str), span, step)
    listed = st.lists(part, min_size=1, max_size=3).map(",".join)
    return st.one_of(st.just("*"), listed) if star else listed


expressions = st.builds(
    lambda *fields: " ".join(fields),
    field(0, 59, True),
    field(0, 23, True),
    st.one_of(st.just("*"), field(1, 31, True)),
    st.just("*"),
    st.one_of(st.just("*"), field(0, 6, True)),
)
# Around the days on which clocks are changed, too.
moments = st.one_of(
    st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1)),
    st.datetimes(datetime(2026, 10, 24, 22), datetime(2026, 10, 25, 6)),
    st.datetimes(datetime(2026, 3, 7, 22), datetime(2026, 3, 8, 12)),
    st.datetimes(datetime(2026, 11, 1), datetime(2026, 11, 1, 12)),
).map(lambda moment: moment.replace(tzinfo=UTC))


@settings(max_examples=40, deadline=None)
@given(expressions, moments, st.sampled_from(ZONES))
def test_it_is_the_first_minute_backwards_that_the_clocks_of_the_zone_show(expression, moment, zone):
    assert cron.faults_of(expression) == []
    there = ZoneInfo(zone)
    found = cron.last(expression, there, moment)
    assert found <= moment and shows(expression, found.astimezone(there))
    at = moment.replace(second=0, microsecond=0)
    for _ in range(10_000):  # a week
        if at <= found:
            assert at == found
            break
        assert not shows(expression, at.astimezone(there)), at
        at -= timedelta(minutes=1)


@pytest.mark.parametrize(
    ("expression", "zone", "moment", "wanted"),
    [
        ("0 3 1 * *", "UTC", "2026-12-01T03:00:04+00:00", "2026-12-01T03:00"),
        ("0 3 1 * *", "UTC", "2026-12-01T02:59:59+00:00", "2026-11-01T03:00"),
        ("0 3 1 * *", "Asia/Shanghai", "2026-11-30T19:00:04+00:00", "2026-11-30T19:00"),
        ("0 3 29 feb *", "UTC", "2026-12-01T00:00:00+00:00", "2024-02-29T03:00"),
        ("5/20 0 * * *", "UTC", "2026-12-01T00:59:00+00:00", "2026-12-01T00:45"),
        # A Friday or a 13th; only a Friday that is a 13th where the day begins with a star.
        ("0 0 13 * fri", "UTC", "2026-12-14T00:00:00+00:00", "2026-12-13T00:00"),
        ("0 0 */12 * fri", "UTC", "2026-12-14T00:00:00+00:00", "2026-11-13T00:00"),
        # 02:30 is skipped there on that day, and comes twice on this one.
        ("30 2 * * *", "America/New_York", "2026-03-08T12:00:00+00:00", "2026-03-07T07:30"),
        ("30 1 * * *", "America/New_York", "2026-11-01T06:29:00+00:00", "2026-11-01T05:30"),
        ("30 1 * * *", "America/New_York", "2026-11-01T06:30:00+00:00", "2026-11-01T06:30"),
    ],
)
def test_times_of_the_calendar(expression, zone, moment, wanted):
    found = cron.last(expression, ZoneInfo(zone), datetime.fromisoformat(moment))
    assert found.strftime("%Y-%m-%dT%H:%M") == wanted


def test_a_day_that_never_comes_is_named():
    with pytest.raises(TuneyardError, match=r"0 3 30 2 \*"):
        cron.last("0 3 30 2 *", ZoneInfo("UTC"), datetime(2026, 12, 1, tzinfo=UTC))


def test_a_day_that_never_comes_is_a_fault_and_one_that_comes_seldom_is_none():
    assert cron.faults_of("0 0 30 2 *") == ["the cron expression '0 0 30 2 *' names no day that there is"]
    # A star in front makes both hold: 29 February on a Sunday, 28 years apart.
    assert cron.faults_of("0 0 29 2 */7") == []
    assert cron.faults_of("0 0 31 4,6,9,11 *") != []
