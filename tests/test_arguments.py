"""What counts as a number among arguments, and what the errors say."""

import math
import re

import numpy as np
import pytest

from irw_optim.arguments import (
    as_real,
    as_whole,
    plain,
    real_number,
    true_or_false,
    whole_number,
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(np.float64(0.5), 0.5), (np.array(3), 3), (np.True_, True), ("auto", "auto")],
)
def test_numbers_become_pythons_own(given, expected):
    assert plain(given) == expected
    assert type(plain(given)) is type(expected)


def test_truth_values_and_words_are_no_real_numbers():
    values = [as_real(value) for value in (1, np.float32(0.5), True, "0.5", -(10**400))]
    assert values == [1.0, 0.5, None, None, -math.inf]


def test_a_whole_number_is_of_an_integer_type():
    assert [as_whole(value) for value in (np.int64(2), 2.0, True)] == [2, None, None]


@pytest.mark.parametrize(
    ("check", "kind", "message"),
    [
        (
            lambda: whole_number("every", 0, least=1),
            ValueError,
            "every=0: expected a whole number >= 1",
        ),
        (
            lambda: whole_number("every", 2.0, 1, "steps"),
            TypeError,
            "every=2.0: expected steps",
        ),
        (
            lambda: real_number("mix", 1.5, "[0, 1]", "the share of plain averaging"),
            ValueError,
            "mix=1.5: expected a number in [0, 1], the share of plain averaging",
        ),
        (
            lambda: real_number("alpha", 0, "(0, 1]"),
            ValueError,
            "alpha=0: expected a number in (0, 1]",
        ),
        (
            lambda: real_number("alpha", math.nan, "(0, 1]"),
            ValueError,
            "alpha=nan: expected a number in (0, 1]",
        ),
        (
            lambda: true_or_false("class_balance", 1),
            TypeError,
            "class_balance=1: expected True or False",
        ),
    ],
)
def test_an_error_names_the_argument_its_value_and_what_is_allowed(check, kind, message):
    with pytest.raises(kind, match=re.escape(message) + "$"):
        check()
