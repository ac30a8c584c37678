"""Changes that are pushed forwards, operation by operation."""

from __future__ import annotations

import pytest
from push_functions import FUNCTIONS
from push_layers import LAYERS
from pushes import Case, assert_case, names_in, numbers

from irw_optim.gradients.operations import RULES


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("case", [*FUNCTIONS, *LAYERS], ids=lambda case: case.name)
def test_equals_rows_of_autograd(case: Case, checkpointed: bool) -> None:
    assert_case(case, checkpointed=checkpointed)


def test_every_operation_of_the_table_is_tested() -> None:
    tested = set[str]()
    for case in [*FUNCTIONS, *LAYERS]:
        tested |= names_in(numbers(case.function(*case.arguments())))
    assert set(RULES) - tested == set()
