"""Dates as documents write them: read to the precision they have, or refused with a reason.

Knows calendars and notations. Does not know where in a document a date stood.
"""

from __future__ import annotations

import datetime
import itertools
import re

from superego.errors import SuperegoError

# 2021, 2021-03, 2021-03-04, each with nothing or a time of day behind the day
_ISO = re.compile(r"(\d{4})(?:[-/.](\d{1,2})(?:[-/.](\d{1,2})(?:[T ].*)?)?)?", re.DOTALL)
_COMPACT = re.compile(
    r"(?:D:)?(\d{4})(\d{2})(\d{2})(?:\D.*|\d{4,}.*)?", re.DOTALL
)  # PDF's form too
_LONGEST = 60  # characters; nothing longer is a date
_MILLISECONDS = 10**11  # a Unix time above this counts milliseconds


def parse_date(text: str, today: datetime.date | None = None) -> str:
    """`YYYY`, `YYYY-MM` or `YYYY-MM-DD`, as precise as `text` is; raises ValueError saying why.

    ISO dates and the notations of the common languages of documents are read; a time of day is
    dropped. Refused are days that no calendar has, dates in the future, texts without a year,
    and numbers that mean different days to different readers (03/04/2021).
    """
    text = " ".join(text.split())
    if not text or len(text) > _LONGEST:
        raise ValueError(f"'{text[:_LONGEST]}' is not a date")
    found = _ISO.fullmatch(text) or _COMPACT.fullmatch(text)
    parts = [int(part) for part in found.groups() if part] if found else _free(text)
    try:
        day = datetime.date(*(parts + [1, 1])[:3])
    except ValueError as error:
        raise ValueError(f"'{text}' is no day of the calendar: {error}") from None
    # a day's grace: it may be tomorrow already where the document was written
    if day > (today or datetime.date.today()) + datetime.timedelta(days=1):
        raise ValueError(f"'{text}' lies in the future")
    return "-".join(f"{part:0{width}d}" for part, width in zip(parts, (4, 2, 2), strict=False))


def parse_timestamp(seconds: float) -> str:
    """The UTC day of a Unix time in seconds or milliseconds; raises ValueError."""
    if abs(seconds) >= _MILLISECONDS:
        seconds /= 1000
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"'{seconds:g}' is not a Unix time") from None
    return parse_date(moment.date().isoformat())


def _free(text: str) -> list[int]:
    """Year, month and day of `4 March 2021` and the like, as many as the text gives."""
    try:
        import dateutil.parser
    except ModuleNotFoundError:
        raise SuperegoError(
            f"reading the date '{text}' needs python-dateutil, which is not installed; "
            "pip install 'superego[sources]'"
        ) from None
    readings = set()
    for day_first, year_first in itertools.product((False, True), repeat=2):
        # What the text leaves open is filled from the default: two defaults show what that was.
        filled = []
        for default in (datetime.datetime(2000, 1, 1), datetime.datetime(2004, 2, 2)):
            try:
                filled.append(
                    dateutil.parser.parse(
                        text,
                        default=default,
                        dayfirst=day_first,
                        yearfirst=year_first,
                        ignoretz=True,
                    )
                )
            except (ValueError, OverflowError, TypeError):
                raise ValueError(f"'{text}' is not a date") from None
        one, other = filled
        if one.year != other.year:
            raise ValueError(f"'{text}' names no year")
        parts = [one.year]
        if one.month == other.month:
            parts.append(one.month)
            if one.day == other.day:
                parts.append(one.day)
        readings.add(tuple(parts))
    if len(readings) > 1:
        days = " or ".join(
            sorted("-".join(f"{part:02d}" for part in reading) for reading in readings)
        )
        raise ValueError(f"'{text}' may be {days}")
    return list(readings.pop())
