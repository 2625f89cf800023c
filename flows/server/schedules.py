"""The schedules of a deployment in `prefect.yaml`. What Prefect would read differently, or never run, is refused.

Prefect drops the timezone inside a recurrence rule, and reads a date without offset as UTC: such a schedule would run at
another hour than the file says. A cron line without any date, such as 30 February, fails in the server's scheduler.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dateutil.rrule import DAILY, HOURLY, MINUTELY, MONTHLY, SECONDLY, YEARLY, rrule, rruleset
from prefect.client.schemas.schedules import SCHEDULE_TYPES, CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.utilities.asyncutils import run_coro_as_sync
from pydantic import BaseModel, ConfigDict, JsonValue, model_validator


class StrictModel(BaseModel):
    """A part of `prefect.yaml`. Unknown keys are refused. A key without a value counts as not given, as in Prefect."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


# Prefect starts an interval without `anchor_date` at the time of deploying, so that each deploy would move the schedule.
ANCHOR = datetime(2020, 1, 1, tzinfo=UTC)

_MOST_DATES = 50_000  # of a rule with an end, to find whether it has ended: under a second
_MOST_EXCLUDED = 1000  # dates in sequence that the exclusions of a set of rules may remove


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
        schedule = self.to_prefect()
        self._means_what_prefect_reads()
        if not has_dates(schedule):
            raise ValueError(f"the schedule never runs: no date fits {getattr(self, given[0])!r}")
        return self

    def _means_what_prefect_reads(self) -> None:
        """Refuse a time in another timezone than `timezone`, which Prefect would shift."""
        if self.cron is not None:
            return
        is_utc = _same_zone(self.timezone or "UTC", "UTC")
        if self.anchor_date is not None and self.anchor_date.tzinfo is None and not is_utc:
            raise ValueError(
                f"anchor_date has no offset, and Prefect reads it as UTC, not as {self.timezone}; "
                f"write the offset, such as {self.anchor_date.isoformat()}+01:00"
            )
        if self.rrule is None:
            return
        for zone in re.findall(r"TZID=([^:;,\s]+)", self.rrule):
            if not _same_zone(zone, self.timezone or "UTC"):
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
        schedule = self.to_prefect()
        return isinstance(schedule, RRuleSchedule) and _has_ended(_rule(schedule), datetime.now(UTC))


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
    if isinstance(rule, rrule):
        return _rule_has_dates(rule)
    rules = [part for part in rule._rrule if _rule_has_dates(part)]
    if not (rule._exrule or rule._exdate):
        return bool(rules or rule._rdate)
    left = rruleset()
    for part in rules:
        left.rrule(list(islice(part, _MOST_EXCLUDED)))
    for date in rule._rdate:
        left.rdate(date)
    for date in rule._exdate:
        left.exdate(date)
    for part in filter(_fits_a_day, rule._exrule):
        left.exrule(part)
    return next(iter(left), None) is not None


def _rule_has_dates(rule: Any) -> bool:
    """Tell whether dateutil finds a date. A rule that no day fits is not searched: that would take a minute, until 9999."""
    times = 1  # in a period of an hour or less, or in a day
    for part, freq in (("_byhour", HOURLY), ("_byminute", MINUTELY), ("_bysecond", SECONDLY)):
        times *= len(getattr(rule, part) or (None,)) if rule._freq < freq else 1
    if rule._bysetpos and rule._freq >= DAILY and min(map(abs, rule._bysetpos)) > times:
        return False
    return _fits_a_day(rule) and next(iter(rule), None) is not None


def _fits_a_day(rule: Any) -> bool:
    """Tell whether a day of any year fits the parts of a rule that are about days, without its interval and its end.

    The rule is searched year by year. For a yearly rule without such a part, dateutil takes the day of DTSTART, so another
    rule gets a day of its own; and the first Monday of a monthly rule is one of each month.
    """
    parts: dict[str, Any] = {"freq": YEARLY, "interval": 1, "until": None, "count": None, "bysetpos": None}
    names = ("bymonthday", "byyearday", "byweekno", "byweekday", "byeaster")
    if rule._freq > MONTHLY and not any(rule._original_rule.get(name) for name in names):
        parts["bymonthday"] = 1
    if rule._freq == MONTHLY and not rule._original_rule.get("bymonth"):
        parts["bymonth"] = range(1, 13)
    return next(iter(rule.replace(**parts)), None) is not None


def _has_ended(rule: Any, now: datetime) -> bool:
    """Tell whether all dates of dateutil's rule or set of rules are before `now`.

    Only rules with an end are searched, and only their first `_MOST_DATES` dates: a rule for each minute since 2020 has
    millions. A longer one counts as not ended.
    """
    rules = [rule] if isinstance(rule, rrule) else rule._rrule
    if all(part._until is not None and part._until < now for part in rules):
        return isinstance(rule, rrule) or all(date < now for date in rule._rdate)
    if any(part._until is None and part._count is None for part in rules):
        return False
    return all(date < now and number < _MOST_DATES for number, date in enumerate(rule))


def _same_zone(first: str, second: str) -> bool:
    """Tell whether two names are of one timezone: the offsets are equal in each hour of the next ten years."""
    if first == second:
        return True
    try:
        zones = ZoneInfo(first), ZoneInfo(second)
    except (ValueError, ZoneInfoNotFoundError):  # an unknown one is like no other
        return False
    start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    hours = (start + timedelta(hours=hour) for hour in range(10 * 366 * 24))
    return all(hour.astimezone(zones[0]).utcoffset() == hour.astimezone(zones[1]).utcoffset() for hour in hours)


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
