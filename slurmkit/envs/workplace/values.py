"""What pandas makes of values: the tools' answers and errors follow from it, as NeMo Gym's tools are written in it.

Of pandas 2.3, which NeMo Gym pins. Texts of errors that are Python's own come from Python here as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, datetime, timedelta
from functools import lru_cache, partial
from typing import Any

import regex
from dateutil import parser

NOW = datetime(2023, 11, 30, 23, 59)
"""The moment at which every episode takes place."""
MISSING = float("nan")
"""An empty cell."""
_EMPTY = frozenset(
    [
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    ]
)
# Without them a search takes no longer than the text is long.
_REPEATS = frozenset("*+?{")
_SEARCH_SECONDS = 0.05
_EPOCH = datetime(1970, 1, 1)
_ISO = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d)?)?")
_CLOCK = re.compile(r"\d\d?:\d\d")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
_WEEKDAYS = frozenset(name.lower() for names in parser.parserinfo.WEEKDAYS for name in names)


class Refused(str):
    """The answer of a tool that did nothing because of what it was given; to a model it is text like any other."""

    __slots__ = ()


def cell(text: str) -> Any:
    """A field of a CSV file, as `read_csv(dtype=str)` has it."""
    return MISSING if text in _EMPTY else text


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None and NaN are alike."""
    return value is None or value != value


def timestamp(value: Any) -> datetime:
    """`pandas.Timestamp`: of ISO 8601 text, of any text that dateutil reads, of nanoseconds since 1970.

    ValueError for text that is no time, TypeError for what is neither text nor number. A time without a date is of
    2023-11-30, where pandas takes the day on which it runs.
    """
    if isinstance(value, str):
        return _parsed(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Cannot convert input [{value}] of type {type(value)} to Timestamp")
    try:
        return _EPOCH + timedelta(microseconds=value / 1000)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def day(value: Any) -> date:
    """The date of `timestamp(value)`."""
    return timestamp(value).date()


@lru_cache(maxsize=65536)
def _parsed(text: str) -> datetime:
    if _ISO.fullmatch(text):
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            pass  # dateutil has the better word for it
    word = text.strip().lower()
    if word in ("now", "today"):
        return NOW
    if len(word) == 1 or (_NUMBER.fullmatch(word) and float(word) < 1000):
        raise ValueError(f'Given date string "{text}" not likely a datetime')
    if word in _WEEKDAYS:
        raise ValueError(f"Unable to parse datetime string: {text}")
    today = NOW.replace(hour=0, minute=0) if _CLOCK.match(word) else datetime.min
    try:
        found: datetime = parser.parse(text, default=today)
        return found
    except (parser.ParserError, OverflowError) as error:
        reason = str(error).replace("Unknown string format", "Unknown datetime string format, unable to parse")
        raise ValueError(reason) from None


def contains(pattern: Any) -> Callable[[Any], bool | None]:
    """`Series.str.contains(pattern, case=False)` of one cell: None where the cell is no text.

    TimeoutError where the search would take very long, which a model can bring about.
    """
    search: Any = re.compile(pattern, re.IGNORECASE).search
    if _REPEATS & set(pattern):
        search = partial(regex.compile(pattern, regex.IGNORECASE | regex.VERSION0).search, timeout=_SEARCH_SECONDS)

    def found(value: Any) -> bool | None:
        return search(value) is not None if isinstance(value, str) else None

    return found
