"""scikit-learn's own checks of an estimator."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

pytest.importorskip("skorch")
from irw_optim.sklearn import IRWClassifier, IRWRegressor

CANNOT_HOLD = {
    # It hands over every argument by name, **nested too: nested=-1. An argument without a prefix
    # is refused when the estimator is made, since a misspelt alpha would be lost without a word.
    "check_do_not_raise_errors_in_init_or_set_param": "has no argument 'nested'",
}
QUICK: dict[str, Any] = {"max_epochs": 10, "lr": 0.01}


def names(check: Any) -> str:
    return check.func.__name__


@pytest.mark.filterwarnings("ignore")  # of the checks, about the data that they make
@parametrize_with_checks([IRWClassifier(**QUICK), IRWRegressor(**QUICK)])
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    reason = next((r for name, r in CANNOT_HOLD.items() if names(check).startswith(name)), None)
    if reason is None:
        check(estimator)
    else:
        with pytest.raises(TypeError, match=reason):
            check(estimator)
