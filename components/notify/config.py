"""Settings of the notify stage."""

from __future__ import annotations

from typing import Literal

from components.shared.settings import Settings

Event = Literal["done", "failed", "stopped", "no-version"]


class NotifyConfig(Settings):
    """Of which ends of a run somebody is told. Where to: a webhook that Slack's format suits.

    The webhook's address is a secret (whoever has it can post), so it stands in no file: the environment's
    TUNEYARD_NOTIFY_URL has it, which on a cluster is the Secret `tuneyard-notify`.

    Args:
        on: `failed`; `stopped` by a gate or a data check; `no-version`: a scheduled run ended well and
            registered no new version; `done`: any other good end.
    """

    on: tuple[Event, ...] = ("failed", "stopped", "no-version")
