"""Amounts of memory as people write them."""

from __future__ import annotations

import pytest

from afina.errors import ConfigError
from afina.memory.sizes import parse_size, shown_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("11GB", 11 * 10**9),
        (" 11 gb ", 11 * 10**9),
        ("11GiB", 11 * 2**30),
        ("11G", 11 * 2**30),
        ("2.5GB", 2_500_000_000),
        (".5 GB", 500_000_000),
        ("512MB", 512 * 10**6),
        ("16000000000", 16 * 10**9),
        (16_000_000_000, 16 * 10**9),
    ],
)
def test_amounts_are_read_as_they_are_written(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0GB", "11 gigs", "1,5GB", "11GB of it", "nan", "1e9"])
def test_what_is_no_amount_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"expected a number and a unit, for example 11GB"):
        parse_size(text)


def test_a_number_that_forgot_its_unit_is_asked_back():
    with pytest.raises(ConfigError, match="did you mean 11GB"):
        parse_size(11)


@pytest.mark.parametrize("amount", [3_700, 137_000, 1.3e6, 99.4e6, 99.6e6, 512e6, 9.87e9, 98.7e9, 99.7e9, 1.3e12])
def test_what_is_shown_reads_back_within_a_hundredth(amount):
    assert parse_size(shown_size(amount).replace(",", "")) == pytest.approx(amount, rel=0.011, abs=500)
