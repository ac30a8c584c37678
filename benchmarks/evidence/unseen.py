"""Remedies on data that nobody tuned on, beside the five targets that they were tuned on.

python -m benchmarks.evidence unseen [--again]      # half an hour of one core
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import report
from benchmarks.data.tasks import TASKS, UNSEEN
from benchmarks.evidence.analysis import FIRST_FIVE
from benchmarks.evidence.evaluation import with_signs
from benchmarks.evidence.grid import unseen
from benchmarks.evidence.sweep import sweep
from benchmarks.training import Recipe

RESULTS = report.RESULTS / "unseen"
SEEN = {name: TASKS[name] for name, _ in FIRST_FIVE}
NOISES = (0.0, 0.1)


def main(given: Sequence[str]) -> None:
    several = {"nargs": "+"}
    chosen = report.options(
        __doc__,
        given,
        tasks={**several, "choices": UNSEEN | SEEN, "default": list(UNSEEN | SEEN)},
        seeds={**several, "type": int, "default": range(1000, 1010)},
        noise={**several, "type": float, "default": NOISES},
        again={"action": "store_true", "help": "texts and figures of stored results"},
    )
    tasks = [task for name, task in (UNSEEN | SEEN).items() if name in chosen.tasks]
    for noise in chosen.noise:
        sweep(tasks, chosen.seeds, [noise], RESULTS, Recipe(), unseen, with_signs)
