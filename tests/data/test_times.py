"""Columns of times: one form for all rows, and nothing guessed."""

from __future__ import annotations

import pytest
from tables import cut, table

from afina.data.times import read_times
from afina.errors import DataError

FORMS = {
    "iso": ["2026-01-31", "2025-12-01", "2026-02-01"],
    "iso with a clock": ["2026-01-31T10:00:00", "2025-12-01T23:59:59", "2026-02-01T00:00:00"],
    "iso with zones": ["2026-01-31T00:30:00+02:00", "2025-12-01T00:00:00Z", "2026-01-31T00:00:00+01:00"],
    "numbers": ["10", "-2.5", "1e3"],
    "German": ["31.01.2026", "01.12.2025", "01.02.2026"],
    "British": ["31/01/2026", "01/12/2025", "01/02/2026"],
    "American": ["01/31/2026", "12/01/2025", "02/01/2026 3:30"],
    "American in the afternoon": ["01/31/2026 02:15 PM", "12/01/2025 11:00 PM", "01/31/2026 03:10 PM"],
    "words": ["31 Jan 2026", "1 Dec 2025", "01 Feb 2026"],
    "mail": ["Sat, 31 Jan 2026 10:00:00 +0000", "Mon, 1 Dec 2025 10:00:00 +0100", "Sun, 1 Feb 2026 10:00:00 GMT"],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_times(form):
    a, b, c = read_times(FORMS[form], [2, 3, 4], "when")
    assert b < a < c


def test_day_and_month_are_not_guessed():
    with pytest.raises(DataError, match=r"day/month/year or as month/day/year, for example '01/02/2026'") as error:
        read_times(["01/02/2026", "03/01/2026"], [2, 3], "when")
    assert "2026-01-31" in str(error.value)


def test_what_cannot_be_read_is_named_and_counted():
    values = [f"2026-01-{i + 1:02}" for i in range(20)] + ["", "soon", "32.1.", "2026-02-30", "x", "y", "z"]
    with pytest.raises(DataError, match="7 values that cannot be read") as error:
        read_times(values, list(range(2, 29)), "when")
    assert "line 22: ''" in str(error.value)
    assert "line 23: 'soon'" in str(error.value)
    assert "and 2 more" in str(error.value)


def test_the_latest_rows_test_and_one_time_is_on_one_side():
    days = [f"2026-{1 + i // 31:02}-{1 + i % 31 % 28:02}" for i in range(199)]
    rows = [(f"text {i} {'abcdefghij'[i % 10] * 9}{i * 37}", "xy"[i % 2], day) for i, day in enumerate(days)]
    done = cut(table(*rows[::-1], columns="tlw"), time="w", clean={"near_duplicates": "ignore"})
    day_of = {example.line: rows[::-1][row][2] for example, row in zip(done.examples, done.rows, strict=True)}
    days_of = {side: {day_of[done.examples[i].line] for i in chosen} for side, chosen in done.sides.items()}
    assert max(days_of["train"]) < min(days_of["validation"])
    assert max(days_of["validation"]) < min(days_of["test"])
    assert len(done.sides["test"]) == pytest.approx(40, abs=4)
    assert done.split == "time"
    with pytest.raises(DataError, match="too few different times"):
        cut(table(*[(t, label, "2026-01-01") for t, label, _ in rows], columns="tlw"), time="w")
