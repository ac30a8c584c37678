"""Each signature on courses made up by hand, on either side of its threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from irw_optim.monitor.rows import Breakdown, Course, Row
from irw_optim.monitor.signatures import diagnose

NAN = float("nan")
ROWS = 40
HEALTHY: dict[str, Any] = {
    "weighted": 1.0,
    "resampled": 0.0,
    "samples": 50.0,
    "worst_off_samples": 15.0,
    "worst_alpha_loss": lambda t: 1 - 0.7 * t,
    "gradient_norm": lambda t: 1 - 0.7 * t,
    "fallback": 0.0,
    "effective_samples": 25.0,
    "effective_share": 0.5,
    "largest_weight": 0.1,
    "removed_share": 0.0,
    "held_for": NAN,
    "held_agreement": NAN,
}


def course(parts: dict[str, list[list[float]]] | None = None, **numbers: Any) -> Course:
    """Rows whose columns are numbers, or functions of the time, which goes from 0 to 1.

    ``parts`` are of each partition the rows of its `Breakdown`: samples, S, weight, removed, loss.
    """
    tables = {kind: np.array(rows) for kind, rows in (parts or {}).items()}
    breakdowns = {kind: Breakdown(tuple(range(len(t))), t) for kind, t in tables.items()}
    columns = {**HEALTHY, **numbers}
    made = Course(interval=1, capacity=ROWS)
    for step in range(1, ROWS + 1):
        at = {n: v(step / ROWS) if callable(v) else v for n, v in columns.items()}
        made.add(Row(step, at, breakdowns))
    return made


def down_and_up_to(end: float) -> Callable[[float], float]:
    """From 1 to a half in the middle, and to ``end``."""
    return lambda t: 1 - t if t < 0.5 else 0.5 + (end - 0.5) * min(1, 4 * (t - 0.5))


def of_class(weight: float, samples: float) -> dict[str, Any]:
    rest = [1 - samples, 0.5, 1 - weight, 0.0, 1.0]
    return {"parts": {"class": [[samples, 0.5, weight, 0.0, 1.0], rest]}}


def of_group(kind: str = "group", weight: float = 0.2, removed: tuple[float, ...] = (0, 0)) -> Any:
    """The second of two parts has a fifth of the samples and the larger loss."""
    first = [0.8, 0.5, 1 - weight, removed[0], 1.0]
    return {"parts": {kind: [first, [0.2, 0.5, weight, removed[1], 2.0]]}}


VANISHING = {"gradient_norm": lambda t: 1e-4**t, "worst_alpha_loss": lambda t: 1 - 0.3 * t}
SIGNATURES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "worst_off_loss_rises": [
        ({"worst_alpha_loss": down_and_up_to(0.65)}, {"worst_alpha_loss": down_and_up_to(0.52)})
    ],
    "worst_off_loss_plateaus": [
        ({"worst_alpha_loss": lambda t: 1 - 0.05 * t}, {"worst_alpha_loss": lambda t: 1 - 0.2 * t})
    ],
    "weight_on_one_class": [
        (of_class(0.95, 0.5), of_class(0.85, 0.5)),
        (of_class(0.95, 0.5), of_class(0.95, 0.8)),
    ],
    "weight_on_few_samples": [
        (
            {"effective_samples": 4.0, "effective_share": 0.08},
            {"effective_samples": 6.0, "effective_share": 0.12},
        ),
        ({"largest_weight": 0.6}, {"largest_weight": 0.4}),
    ],
    "few_worst_off": [({"worst_off_samples": 2.0}, {"worst_off_samples": 3.0})],
    "gradients_vanished": [
        ({"fallback": 0.1}, {"fallback": 0.01}),
        (VANISHING, {**VANISHING, "gradient_norm": lambda t: 1e-2**t}),
        (VANISHING, {**VANISHING, "worst_alpha_loss": lambda t: 0.01**t}),
    ],
    "batches_without_weight": [
        ({"held_for": 3.0, "fallback": 0.1}, {"held_for": 3.0, "fallback": 0.01})
    ],
    "filter_removes_many": [({"removed_share": 0.15}, {"removed_share": 0.08})],
    "filter_removes_one_class": [
        (of_group("class", removed=(0.0, 0.2)), of_group("class", removed=(0.2, 0.2)))
    ],
    "filter_removes_one_group": [
        (of_group(removed=(0.02, 0.2)), of_group(removed=(0.1, 0.2))),
    ],
    "worst_group_underweighted": [(of_group(weight=0.1), of_group(weight=0.18))],
    "stale_weights": [
        ({"held_for": 5.0, "held_agreement": 0.7}, {"held_for": 5.0, "held_agreement": 0.8})
    ],
}
CASES = [(name, *both) for name, sides in SIGNATURES.items() for both in sides]


def found(**options: Any) -> set[str]:
    return {finding.name for finding in diagnose(course(**options))}


def test_the_healthy_course_has_no_finding() -> None:
    assert found() == set()


@pytest.mark.parametrize(("name", "over", "under"), CASES, ids=[name for name, *_ in CASES])
def test_a_signature_is_seen_over_its_threshold_and_not_under_it(
    name: str, over: dict[str, Any], under: dict[str, Any]
) -> None:
    assert name in found(**over)
    assert name not in found(**under)
