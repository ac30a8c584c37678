"""The processes of a module's cases, started once for all of its tests."""

import pytest
import ranked


@pytest.fixture(scope="module")
def in_two(request, tmp_path_factory):
    """What the module's ``CASES`` returned in two processes."""
    return ranked.run(request.module.CASES, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def in_four(request, tmp_path_factory):
    """What those in the module's ``IN_FOUR`` returned in four processes."""
    cases = {case: request.module.CASES[case] for case in request.module.IN_FOUR}
    return ranked.run(cases, 4, tmp_path_factory.mktemp("four"))
