"""The `schedule:` section, and cron expressions as Kubeflow Pipelines takes them."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from components.shared.settings import Settings

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
    return faults


def _number(text: str, field: str) -> int | None:
    names = _NAMES.get(field, [])
    if text.isascii() and text.isdigit():
        return int(text)
    least = 1 if field == "month" else 0
    return names.index(text.lower()) + least if text.lower() in names else None


def for_kfp(cron: str) -> str:
    """The same times as Kubeflow Pipelines writes them: with a field of seconds in front."""
    return f"0 {' '.join(cron.split())}"


class ScheduleConfig(Settings):
    """When a cluster starts the pipeline by itself; one machine has no scheduler and does nothing with it.

    Args:
        cron: minute hour day-of-month month day-of-week, in the time zone of the cluster's Kubeflow Pipelines
            (UTC unless it was given CRON_SCHEDULE_TIMEZONE).
    """

    cron: str = Field(examples=["0 3 1 * *"])

    @field_validator("cron")
    @classmethod
    def _readable(cls, cron: str) -> str:
        faults = faults_of(cron)
        if faults:
            raise ValueError("; ".join(faults))
        return " ".join(cron.split())
