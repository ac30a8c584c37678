"""Trials of every kind: other forwards, other loops, other parameters; each equal to the loop.

Every kind has fixed cases, numbered by a seed. ``FUZZ_CASES=100`` runs that many others of each
kind, new ones at every run. What fails is printed with a line that runs that case alone.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import test_fuzz
from fuzz_changes import CHANGES, with_changes
from fuzz_criteria import CRITERIA, REFUSED, asked
from fuzz_dtypes import PRECISIONS, precise
from fuzz_gradients import GRADIENTS, with_gradients
from fuzz_loops import LOOPS, one_model
from fuzz_mixing import KINDS, mixing
from fuzz_networks import ACCUMULATED, NETWORKS, STEPS, one_batch, over_time, several_networks
from fuzz_optimizers import OPTIMIZERS, optimizers
from fuzz_parameters import USES, using
from fuzz_shapes import CHAIN, shapes
from fuzz_ties import TIES, tied
from fuzz_trials import Draw, Trial


class Family(NamedTuple):
    """Trials of some kinds.

    Attributes:
        draw: a trial of a kind.
        kinds: their names.
        cases: of each kind.
    """

    draw: Callable[[Draw, str], Trial]
    kinds: Iterable[str]
    cases: int


FAMILIES = {
    "samples that mix": Family(mixing, KINDS, 8),
    "shapes": Family(shapes, CHAIN, 8),
    "loops": Family(one_model, LOOPS, 40),
    "gradients": Family(with_gradients, GRADIENTS, 40),
    "networks": Family(several_networks, NETWORKS, 40),
    "accumulation": Family(one_batch, ACCUMULATED, 120),
    "time": Family(over_time, STEPS, 80),
    "changes": Family(with_changes, CHANGES, 40),
    "optimizers": Family(optimizers, OPTIMIZERS, 40),
    "parameters": Family(using, USES, 7),
    "precision": Family(precise, PRECISIONS, 24),
    "ties": Family(tied, TIES, 20),
    "criteria": Family(asked, CRITERIA, 20),
}

TRIED = int(os.environ.get("FUZZ_CASES", "0"))
ONE = os.environ.get("FUZZ_ONE", "")
SHOWN = 12


def trial(family: str, kind: str, seed: int) -> Trial:
    return FAMILIES[family].draw(Draw(f"{family}: {kind}", seed), kind)


def again(family: str, kind: str, seed: int) -> str:
    """The line that runs a case alone."""
    return f'FUZZ_ONE="{family}: {kind}: {seed}" pytest tests/fuzz/test_kinds.py -k one_alone'


def fuzz(family: str, cases: int) -> None:
    """All kinds of a family: no error, and most of them compared."""
    first = random.SystemRandom().randrange(2**32) if TRIED else 0
    wrong: list[str] = []
    for kind in FAMILIES[family].kinds:
        outcomes: Counter[str] = Counter()
        for seed in range(first, first + (TRIED or cases)):
            case = trial(family, kind, seed)
            try:
                outcomes[case()] += 1
            except Exception as error:
                outcomes["wrong"] += 1
                text = str(error).splitlines()[0] if str(error) else ""
                wrong.append(
                    f"{again(family, kind, seed)}\n    {case.story}\n"
                    f"    {type(error).__name__}: {text}"
                )
        usual = "refused" if kind in REFUSED else "exact"
        if cases > 4 and 4 * outcomes[usual] < outcomes.total() - 4 * outcomes["wrong"]:
            wrong.append(f"{family}: {kind}: hardly any case was {usual}: {dict(outcomes)}")
    if wrong:
        more = f"\n... and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        pytest.fail("\n".join(wrong[:SHOWN]) + more, pytrace=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_some(family: str) -> None:
    fuzz(family, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_three_thousand(family: str) -> None:
    fuzz(family, FAMILIES[family].cases)


@pytest.mark.skipif(not ONE, reason="FUZZ_ONE names no case")
def test_one_alone() -> None:
    *name, seed = ONE.split(": ")
    case = trial(name[0], ": ".join(name[1:]), int(seed))
    print(case.story)  # noqa: T201
    case()


def test_they_are_five_thousand_together() -> None:
    ours = sum(family.cases * len(list(family.kinds)) for family in FAMILIES.values())
    assert ours + test_fuzz.MANY * len(test_fuzz.FAMILIES) >= 5000
