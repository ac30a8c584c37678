"""Random models, batches and options: two thousand cases, each equal to the loop or refused.

Every family of models draws its own cases with hypothesis and counts what it compared. A case is
plain data: the one that hypothesis prints is the reproducer. ``FUZZ_CASES=100`` draws that many
other cases in each family, new ones at every run.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
from fuzz_cases import cases
from fuzz_compare import compare
from hypothesis import HealthCheck, given, settings

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("vector", ("linear", "last-dimension norm", "channel norm")),
    "batch norm": ("vector", ("batch norm",)),
    "dense, shared": ("vector", ("shared parameters", "direct parameters", "nested")),
    "mixing": ("vector", ("mixing",)),
    "tokens": ("tokens", ()),
    "tokens, positions": ("tokens", ("positions",)),
    "sequence": ("sequence", ("linear", "last-dimension norm", "convolution")),
    "sequence, nested": ("sequence", ("nested", "shared parameters", "direct parameters")),
    "recurrent": ("sequence", ("recurrent",)),
    "attention": ("sequence", ("attention",)),
    "convolution, 1": ("map1", ("convolution",)),
    "convolution, 2": ("map2", ("convolution", "channel norm")),
    "convolution, 3": ("map3", ("convolution",)),
    "images": ("map2", ("batch norm", "nested", "direct parameters", "pooling")),
}
MANY, FEW = 150, 15

TRIED = int(os.environ.get("FUZZ_CASES", "0"))


def fuzz(family: str, examples: int) -> Counter[str]:
    """Compare ``examples`` cases of a family, and say how they went."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=TRIED or examples,
        derandomize=not TRIED,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(cases(*FAMILIES[family]))
    def every(case):
        outcomes[compare(case)] += 1

    every()
    return outcomes


@pytest.mark.parametrize("family", FAMILIES)
def test_some(family: str) -> None:
    assert fuzz(family, FEW).total() >= FEW


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_thousand(family: str) -> None:
    outcomes = fuzz(family, MANY)
    assert outcomes.total() >= MANY
    assert outcomes["exact"] > 0.75 * MANY, outcomes


def test_they_are_two_thousand_together() -> None:
    assert MANY * len(FAMILIES) >= 2000
