"""Cron expressions of five fields (minute hour day month weekday), as Kubeflow Pipelines reads them.

Its scheduler has robfig/cron 1.2, with a field of seconds in front: `5/10` goes from 5 to the end of the
field, and of a day of the month and a weekday both must hold where either begins with a star,
one where neither does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from components.shared.errors import TuneyardError

_FIELDS = (
    ("minute", 0, 59),
    ("hour", 0, 23),
    ("day of month", 1, 31),
    ("month", 1, 12),
    ("day of week", 0, 6),
)
_NAMES = {
    "month": ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    "day of week": ["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
}
_PART = re.compile(r"^(\*|\?|(?P<low>\w+)(-(?P<high>\w+))?)(/(?P<step>\d+))?$")
# Between two 29 Februaries on one weekday lie 28 years, 40 where a century is none.
_LONGEST_DAYS = 41 * 366


class _Times(NamedTuple):
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    both_days: bool  # of day and weekday both must hold


def faults_of(cron: str) -> list[str]:
    """What is wrong with a cron expression of five fields (minute hour day month weekday), every fault."""
    fields = cron.split()
    if len(fields) != len(_FIELDS):
        return [f"{cron!r} has {len(fields)} fields; write five: minute hour day-of-month month day-of-week"]
    faults = []
    for text, (name, least, most) in zip(fields, _FIELDS, strict=True):
        for part in text.split(","):
            match = _PART.match(part)
            ends = [match[end] for end in ("low", "high") if match[end]] if match else []
            numbers = [_number(end, name) for end in ends]
            if match is None or None in numbers:
                faults.append(f"{name} {part!r} is not *, a number, a range or a step (*/6)")
            elif any(not least <= (number or 0) <= most for number in numbers):
                faults.append(f"{name} {part!r} is not within {least}-{most}")
            elif len(numbers) == 2 and (numbers[0] or 0) > (numbers[1] or 0):
                faults.append(f"{name} {part!r} ends before it begins")
            elif match["step"] and int(match["step"]) == 0:
                faults.append(f"{name} {part!r}: a step of 0 never comes")
    if not faults:
        try:
            last(cron, ZoneInfo("UTC"), datetime.now(UTC))
        except TuneyardError as error:
            faults.append(error.what)
    return faults


def _number(text: str, field: str) -> int | None:
    names = _NAMES.get(field, [])
    if text.isascii() and text.isdigit():
        return int(text)
    least = 1 if field == "month" else 0
    return names.index(text.lower()) + least if text.lower() in names else None


def zone_of(name: str) -> ZoneInfo:
    """A time zone by its IANA name.

    Raises:
        TuneyardError: there is none of that name.
    """
    try:
        return ZoneInfo(name)
    except (ValueError, ZoneInfoNotFoundError, OSError) as error:
        raise TuneyardError(f"{name!r} is no time zone", "name one as Europe/Berlin, or UTC") from error


def last(cron: str, zone: ZoneInfo, moment: datetime) -> datetime:
    """The last time of a cron expression that is not after a moment.

    Args:
        cron: five fields, without a fault.
        zone: in which the fields are read. A time that the clocks skip there has no slot; one that they show
            twice has two.
        moment: with a time zone.

    Returns:
        It, in UTC.

    Raises:
        TuneyardError: it never comes (30 February).
    """
    times = _times(cron)
    day = moment.astimezone(zone).date()
    for back in range(_LONGEST_DAYS):
        found = [at for at in _on(day - timedelta(days=back), times, zone) if at <= moment]
        if found:
            return max(found)
    raise TuneyardError(f"the cron expression {cron!r} names no day that there is", "correct the schedule")


def _times(cron: str) -> _Times:
    fields = cron.split()
    minutes, hours, days, months, weekdays = (
        _values(text, *field) for text, field in zip(fields, _FIELDS, strict=True)
    )
    starred = any(part[0] in "*?" for text in (fields[2], fields[4]) for part in text.split(","))
    return _Times(minutes, hours, days, months, weekdays, starred)


def _values(text: str, name: str, least: int, most: int) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.match(part)
        if match is None:
            raise TuneyardError(f"{name} {part!r} is not *, a number, a range or a step (*/6)", "correct it")
        low = least if match["low"] is None else _number(match["low"], name)
        alone = match["low"] is not None and match["high"] is None and match["step"] is None
        high = low if alone else most if match["high"] is None else _number(match["high"], name)
        found.update(range(low or 0, (high or 0) + 1, int(match["step"] or 1)))
    return frozenset(found)


def _on(day: date, times: _Times, zone: ZoneInfo) -> Iterator[datetime]:
    """The moments of a day in its zone, in UTC."""
    # Monday is 0 in Python and 1 here.
    holds = (day.day in times.days, day.isoweekday() % 7 in times.weekdays)
    if day.month not in times.months or not (all(holds) if times.both_days else any(holds)):
        return
    for hour in times.hours:
        for minute in times.minutes:
            wall = datetime.combine(day, time(hour, minute))
            for fold in (0, 1):
                at = wall.replace(tzinfo=zone, fold=fold).astimezone(UTC)
                if at.astimezone(zone).replace(tzinfo=None) == wall:
                    yield at
