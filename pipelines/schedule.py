"""The `schedule:` section, and cron expressions as Kubeflow Pipelines takes them."""

from __future__ import annotations

from pydantic import Field, field_validator

from components.shared.cron import faults_of
from components.shared.settings import Settings


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
