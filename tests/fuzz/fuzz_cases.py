"""Random cases: a model, a criterion, batches and options, as plain data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fuzz_losses import Task, tasks
from fuzz_models import Blueprint, models
from hypothesis import strategies as st


class Case(NamedTuple):
    """All that one case is made of; printed by hypothesis when it fails."""

    model: Blueprint
    task: Task
    steps: tuple[tuple[tuple[int, int], ...], ...]  # of each step, of each pass: B and T
    dtype: torch.dtype
    engine: str
    way: str
    alpha: float
    options: dict[str, Any]
    scored: str
    filtered: str
    frozen: tuple[int, ...]
    factor: float
    extra_term: bool
    head_alone: bool
    seed: int


@st.composite
def cases(draw, kind: str, focus: tuple[str, ...] = ()) -> Case:
    """A case whose model reads ``kind``, with a block of ``focus``."""

    def pick(*values):
        return draw(st.sampled_from(values))

    model = draw(models(kind, focus))
    task = draw(tasks())
    passes = pick(1, 1, 1, 2, 3)
    size = st.tuples(st.sampled_from([0, 1, 2, 3, 4, 4, 5, 6]), st.integers(1, 5))
    one = st.lists(size, min_size=passes, max_size=passes).map(tuple)
    steps = tuple(draw(st.lists(one, min_size=1, max_size=3)))
    weighting = pick("irw", "irw", "irw", "irw", "cvar", "uniform")
    options = {
        "center": pick(0.0, 0.0, 0.5, 1.0) if weighting == "irw" else 0.0,
        "mix": pick(0.0, 0.0, 0.25, 1.0),
        "class_balance": task.has_labels and not model.per_token and pick(False, True),
        "warmup_steps": pick(0, 0, 0, 1),
        "weighting": weighting,
        "accumulation_steps": passes,
    }
    return Case(
        model=model,
        task=task,
        steps=steps,
        dtype=pick(torch.float64, torch.float64, torch.float32),
        engine=pick("auto", "auto", "auto", "ghost", "autodiff"),
        way=pick("criterion", "criterion", "losses"),
        alpha=pick(0.05, 0.2, 0.3, 0.5, 1.0),
        options=options,
        scored=pick("all", "all", "all", "last", "matrices"),
        filtered=pick("no", "no", "no", "dbscan", "long gradients"),
        frozen=tuple(draw(st.lists(st.integers(0, 20), max_size=3))),
        factor=pick(1.0, 1.0, 0.5, 1024.0),
        extra_term=passes == 1 and pick(False, False, True),
        head_alone=pick(False, False, False, False, True),
        seed=draw(st.integers(0, 2**16)),
    )
