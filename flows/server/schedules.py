"""The schedules of a deployment in `prefect.yaml`. What Prefect would read differently, or never run, is refused.

Prefect drops the timezone inside a recurrence rule, and reads a date without offset as UTC: such a schedule would run at
another hour than the file says. A cron line without any date, such as 30 February, fails in the server's scheduler.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from dateutil.rrule import YEARLY, rrule
from prefect.client.schemas.schedules import SCHEDULE_TYPES, CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.utilities.asyncutils import run_coro_as_sync
from pydantic import JsonValue, model_validator

from loraflow.flows.server.strict_model import StrictModel

# Prefect starts an interval without `anchor_date` at the time of deploying, so that each deploy would move the schedule.
ANCHOR = datetime(2020, 1, 1, tzinfo=UTC)


class Schedule(StrictModel):
    """A schedule: exactly one of cron, interval and rrule.

    `active` counts when the schedule is created; later a person switches it in the UI. The slug, unique in a deployment,
    lets a later deploy find the schedule again.
    """

    cron: str | None = None
    interval: timedelta | None = None  # in YAML: seconds, or an ISO 8601 duration
    rrule: str | None = None
    timezone: str | None = None
    anchor_date: datetime | None = None  # of an interval
    day_or: bool = True  # of a cron schedule: either of day of month and day of week, or both
    active: bool = True
    parameters: dict[str, JsonValue] = {}
    slug: str = ""

    @model_validator(mode="after")
    def _is_a_schedule(self) -> Schedule:
        given = [name for name in ("cron", "interval", "rrule") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of cron, interval and rrule; got {' and '.join(given) or 'none'}")
        for name, value, of in (("anchor_date", self.anchor_date, "interval"), ("day_or", not self.day_or, "cron")):
            if value and given != [of]:
                raise ValueError(f"{name} is only for schedules with {of}")
        self._means_what_prefect_reads()
        if not has_dates(self.to_prefect()):
            raise ValueError(f"the schedule never runs: no date fits {getattr(self, given[0])!r}")
        return self

    def _means_what_prefect_reads(self) -> None:
        """Refuse a time in another timezone than `timezone`, which Prefect would shift."""
        is_utc = self.timezone in (None, "UTC", "Etc/UTC")
        if self.anchor_date is not None and self.anchor_date.tzinfo is None and not is_utc:
            raise ValueError(
                f"anchor_date has no offset, and Prefect reads it as UTC, not as {self.timezone}; "
                f"write the offset, such as {self.anchor_date.isoformat()}+01:00"
            )
        if self.rrule is None:
            return
        for zone in re.findall(r"TZID=([^:;,\s]+)", self.rrule):
            if zone != (self.timezone or "UTC"):
                raise ValueError(
                    f"Prefect ignores TZID={zone} in an rrule and would run at these hours of {self.timezone or 'UTC'}; "
                    f"remove TZID, and write timezone: {zone}"
                )
        if not is_utc and re.search(r"\d{6}Z", self.rrule):
            raise ValueError(
                f"Prefect reads the times in an rrule as times of {self.timezone}, also those that end with Z (UTC); "
                "write them without Z, as local times"
            )

    def to_prefect(self) -> SCHEDULE_TYPES:
        """Return Prefect's schedule, which checks the expression and the timezone."""
        if self.cron is not None:
            return CronSchedule(cron=self.cron, timezone=self.timezone, day_or=self.day_or)
        if self.rrule is not None:
            return RRuleSchedule(rrule=self.rrule, timezone=self.timezone or "UTC")
        assert self.interval is not None
        return IntervalSchedule(
            interval=self.interval, anchor_date=self.anchor_date or ANCHOR, timezone=self.timezone or "UTC"
        )

    @property
    def has_ended(self) -> bool:
        """Tell whether all dates of the schedule are in the past."""
        return next_run(self.to_prefect(), datetime.now(UTC)) is None


def next_run(schedule: SCHEDULE_TYPES, now: datetime) -> datetime | None:
    """Return the first date from `now` on on which a schedule runs, as Prefect's server computes it; None if there is none.

    An interval has no end; `now` is returned.
    """
    if isinstance(schedule, CronSchedule):
        return _next_of_cron(schedule, now)
    if isinstance(schedule, RRuleSchedule):
        date: datetime | None = _rule(schedule).after(now, inc=True)
        return date
    return now


def has_dates(schedule: SCHEDULE_TYPES) -> bool:
    """Tell whether a schedule has any date, in the past or in the future.

    Raises:
        ValueError: the server could not compute it.
    """
    if isinstance(schedule, CronSchedule):
        return _next_of_cron(schedule, datetime.now(UTC)) is not None
    if not isinstance(schedule, RRuleSchedule):
        return True
    rule = _rule(schedule)
    # dateutil looks for a date until the year 9999: that takes 2 s year by year, and a minute day by day.
    days = rule.replace(freq=YEARLY, interval=1) if isinstance(rule, rrule) else rule
    return next(iter(days), None) is not None


def _next_of_cron(schedule: CronSchedule, now: datetime) -> datetime | None:
    from prefect.server.schemas.schedules import CronSchedule as OfServer  # imports the server: only for deployments

    try:
        dates: Any = run_coro_as_sync(OfServer(**schedule.model_dump()).get_dates(n=1, start=now))
    except ValueError:  # croniter's CroniterBadDateError: no date within 50 years
        return None
    first: datetime | None = dates[0] if dates else None
    return first


def _rule(schedule: RRuleSchedule) -> Any:
    """Return dateutil's rule or set of rules (it has no types)."""
    return schedule.to_rrule()
