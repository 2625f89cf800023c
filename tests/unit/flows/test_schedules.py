"""Schedules of prefect.yaml: accepted if Prefect's server finds a date, and read quickly."""

import asyncio
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from loraflow.flows.server.schedules import Schedule

BEFORE_ALL = datetime(2015, 1, 1, tzinfo=UTC)


def is_accepted(**fields):
    try:
        return bool(Schedule(**fields))
    except ValidationError as error:
        assert "never runs" in str(error)
        return False


def dates_of_server(rule):
    from prefect.server.schemas.schedules import RRuleSchedule

    return asyncio.run(RRuleSchedule(rrule=rule).get_dates(n=1, start=BEFORE_ALL))


DAYS = st.sampled_from(
    ["", ";BYDAY=MO,TH", ";BYMONTHDAY=28", ";BYMONTHDAY=-1", ";BYMONTH=2", ";BYMONTH=2,11;BYDAY=SU", ";BYYEARDAY=100"]
)


@given(
    start=st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31)),
    freq=st.sampled_from(["YEARLY", "MONTHLY", "WEEKLY", "DAILY", "HOURLY"]),
    days=DAYS | st.just(";BYDAY=1MO"),
    hours=st.sampled_from(["", ";BYHOUR=3", ";BYHOUR=0,12;BYMINUTE=30"]),
    end=st.none() | st.datetimes(datetime(2026, 6, 1), datetime(2028, 6, 1)) | st.integers(1, 3),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_rule_is_accepted_exactly_if_the_server_finds_a_date(start, freq, days, hours, end):
    until = f";UNTIL={end:%Y%m%dT%H%M%S}" if isinstance(end, datetime) else ""
    count = f";COUNT={end}" if isinstance(end, int) else ""
    rule = f"DTSTART:{start:%Y%m%dT%H%M%S}\nRRULE:FREQ={freq}{days}{hours}{until}{count}"
    assert is_accepted(rrule=rule) == bool(dates_of_server(rule))


@pytest.mark.parametrize(
    "rule",
    [
        "DTSTART:20261127T100000\nRRULE:FREQ=DAILY;BYHOUR=3;BYMINUTE=0;UNTIL=20271115T000000",
        "FREQ=WEEKLY;BYHOUR=3;BYMINUTE=0;UNTIL=20261230T000000",
        "FREQ=MONTHLY;BYDAY=1MO;UNTIL=20261231T000000",
        "FREQ=MONTHLY;BYDAY=1MO;BYYEARDAY=182",  # the first of July, which is no first Monday of a year
        "DTSTART:20260130T000000\nRRULE:FREQ=DAILY;BYMONTH=2",
        "RRULE:FREQ=DAILY;UNTIL=20200102T000000\nEXDATE:20200101T000000",
    ],
)
def test_a_rule_with_dates_on_other_days_than_that_of_its_start_is_accepted(rule):
    assert dates_of_server(rule) and is_accepted(rrule=rule)


@pytest.mark.parametrize(
    "rule",
    [
        "DTSTART:20260130T000000\nRRULE:FREQ=MONTHLY;BYMONTH=2",
        "DTSTART:20210101T000000\nRRULE:FREQ=YEARLY;INTERVAL=4;BYMONTH=2;BYMONTHDAY=29",
        "DTSTART:20270101T000000\nRRULE:FREQ=DAILY;UNTIL=20260101T000000",
        "RRULE:FREQ=DAILY;COUNT=1\nEXDATE:20200101T000000",
    ],
)
def test_a_rule_of_which_the_server_finds_no_date_is_refused(rule):
    assert not dates_of_server(rule) and not is_accepted(rrule=rule)


@pytest.mark.parametrize(
    "rule",
    ["FREQ=SECONDLY;BYSETPOS=2", "FREQ=DAILY;BYHOUR=3;BYSETPOS=2", "FREQ=DAILY;BYMONTH=13", "FREQ=DAILY;COUNT=0"],
)
def test_a_rule_that_the_server_would_search_for_until_the_year_9999_is_refused_quickly(rule):
    started = time.process_time()
    assert not is_accepted(rrule=rule)
    assert time.process_time() - started < 10, "the server needs a minute or more"


@pytest.mark.parametrize(
    ("rule", "has_ended"),
    [
        ("FREQ=MINUTELY", False),
        ("FREQ=SECONDLY;INTERVAL=30", False),
        ("FREQ=SECONDLY;COUNT=1000000000", False),  # until 2051
        ("FREQ=MINUTELY;UNTIL=20990101T000000", False),
        ("FREQ=MINUTELY;UNTIL=20250101T000000", True),
        ("FREQ=HOURLY;COUNT=20000", True),
        ("RRULE:FREQ=DAILY;COUNT=3\nRDATE:20990101T000000", False),
        ("RRULE:FREQ=DAILY;UNTIL=20200201T000000\nRDATE:20210101T000000", True),
    ],
)
def test_it_is_known_quickly_whether_a_rule_with_many_dates_has_ended(rule, has_ended):
    started = time.process_time()
    assert Schedule(rrule=rule).has_ended == has_ended
    assert time.process_time() - started < 10, "all minutes since 2020 take a minute"


@pytest.mark.parametrize(
    "fields",
    [
        {"interval": 86400, "anchor_date": "2026-01-01T09:00:00", "timezone": "GMT"},
        {"rrule": "DTSTART:20240101T090000Z\nRRULE:FREQ=DAILY", "timezone": "Etc/UCT"},
        {"rrule": "DTSTART;TZID=US/Eastern:20240101T090000\nRRULE:FREQ=DAILY", "timezone": "America/New_York"},
    ],
)
def test_two_names_of_one_timezone_are_equal(fields):
    assert is_accepted(**fields)


@pytest.mark.parametrize("zone", ["America/Havana", "America/Lima", "No/Where"])
def test_a_timezone_that_differs_in_an_hour_of_the_year_is_another_one(zone):
    rule = f"DTSTART;TZID={zone}:20240101T090000\nRRULE:FREQ=DAILY"
    with pytest.raises(ValidationError, match="ignores TZID"):
        Schedule(rrule=rule, timezone="America/New_York")
    with pytest.raises(ValidationError, match="without offset|no offset"):
        Schedule(interval=60, anchor_date="2026-01-01T09:00:00", timezone="Europe/London")
