"""N processes on the shards of a batch make the update of one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import SHARDS, Training, check_the_update_of_one

from irw_optim import DBSCANFilter, PerSampleLoss

pytestmark = pytest.mark.slow

REMOVES_SOME = DBSCANFilter(quantile=0.8)
WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
CROSS_ENTROPY = nn.CrossEntropyLoss


def largest_first(losses: Tensor, gradients: Any, worst_off: Tensor) -> Tensor:
    """A rule of one's own that asks for a product."""
    return gradients.dot(gradients.combine(losses)) * worst_off


def no_gradient(output: Tensor, target: Tensor) -> Tensor:
    """Losses that nobody can lower: all scores are 0."""
    return 0 * output.square().sum(1) + target


CASES = {
    "IRW": Training(),
    "given the DDP": Training(around=True),
    "way 2": Training(way=2),
    "static graph": Training(ddp={"static_graph": True}),
    "static graph, way 2": Training(ddp={"static_graph": True}, way=2, around=True),
    "bucket views": Training(ddp={"gradient_as_bucket_view": True}),
    "static graph and bucket views": Training(
        ddp={"static_graph": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4}
    ),
    "unused parameters": Training("branching", ddp={"find_unused_parameters": True}),
    "centre": Training(irw={"center": 1.0}),
    "class balance": Training(irw={"class_balance": True}),
    "class balance, ignored": Training(irw={"class_balance": True}, ignored=True),
    "mix": Training(irw={"mix": 0.3}),
    "warm-up": Training(irw={"warmup_steps": 2}),
    "warm-up, static graph": Training(irw={"warmup_steps": 2}, ddp={"static_graph": True}),
    "CVaR": Training(irw={"weighting": "cvar"}),
    "uniform": Training(irw={"weighting": "uniform"}, ignored=True),
    "rule of one's own": Training(irw={"weighting": largest_first}),
    "last layer": Training(irw={"score_parameters": "last"}),
    "autodiff": Training(irw={"engine": "autodiff"}),
    "recurrent": Training("gru"),
    "images": Training("images"),
    "complex": Training("spectral"),
    "IRWO, complex": Training("spectral", irw={"outliers": REMOVES_SOME}),
    "transformer": Training("transformer"),
    "time first": Training("time first"),
    "IRWO, transformer": Training("transformer", irw={"outliers": REMOVES_SOME}),
    "sum": Training(criterion=CROSS_ENTROPY(reduction="sum"), steps=2),
    "class weights": Training(criterion=CROSS_ENTROPY(weight=WEIGHTS)),
    "class weights, sum": Training(criterion=CROSS_ENTROPY(WEIGHTS, reduction="sum"), steps=2),
    "ignored": Training(ignored=True),
    "class weights, ignored": Training(criterion=CROSS_ENTROPY(WEIGHTS), ignored=True),
    "sequences": Training("tagger"),
    "sequences, class weights": Training("tagger", criterion=CROSS_ENTROPY(WEIGHTS)),
    "sequences, plain": Training("tagger", irw={"warmup_steps": 9}),
    "IRWO": Training(irw={"outliers": REMOVES_SOME}),
    "IRWO, centre": Training(irw={"outliers": REMOVES_SOME, "center": 1.0}),
    "IRWO, images": Training("images", irw={"outliers": REMOVES_SOME}),
    "IRWO, sequences": Training("tagger", irw={"outliers": REMOVES_SOME}),
    "IRWO, recurrent": Training("gru", irw={"outliers": REMOVES_SOME}),
    "nobody can be helped": Training(criterion=PerSampleLoss(no_gradient)),
    "three passes": Training(passes=3, no_sync=True),
    "three passes, static graph": Training(passes=3, no_sync=True, ddp={"static_graph": True}),
    "weighed together": Training(passes=3, no_sync=True, irw={"accumulation_steps": 3}),
    "weighed together, in step": Training(passes=3, irw={"accumulation_steps": 3}),
    "weighed together, class weights": Training(
        passes=2, criterion=CROSS_ENTROPY(WEIGHTS), ignored=True, irw={"accumulation_steps": 2}
    ),
    "weighed together, IRWO": Training(
        passes=2, no_sync=True, irw={"accumulation_steps": 2, "outliers": REMOVES_SOME}
    ),
    "weighed together, to be finished": Training(passes=3, irw={"accumulation_steps": 5}),
    "100 steps": Training(steps=100, lr=0.03, irw={"warmup_steps": 20}),
}
IN_FOUR = ["IRW", "way 2", "static graph", "unused parameters", "class balance", "warm-up", "CVaR"]
IN_FOUR += ["class weights, ignored", "sequences, class weights", "IRWO", "IRWO, sequences"]
IN_FOUR += ["recurrent", "three passes", "weighed together", "nobody can be helped", "100 steps"]
IN_COMPLEX = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch's DistributedDataParallel refuses complex numbers"
)
RANKS = [
    pytest.param(case, 2, marks=[IN_COMPLEX] if "complex" in case else []) for case in CASES
] + [(case, 4) for case in IN_FOUR]


@pytest.mark.parametrize(("case", "ranks"), RANKS)
def test_several_processes_make_the_update_of_one(case, ranks, request):
    outcomes = request.getfixturevalue("in_two" if ranks == 2 else "in_four").of(case)
    check_the_update_of_one(outcomes, CASES[case].alone(ranks))


def test_the_cases_are_what_they_are_meant_to_be(in_two, in_four):
    """Some rank has nobody who is worst off, some has nobody at all, and the filter finds some."""
    members = [o["record"].worst_off[o["record"].own].sum() for o in in_four.of("IRW")]
    assert SHARDS[4][2] == 0
    assert min(members[:2]) == 0
    assert sum(members) == 8
    for case in ("IRWO", "IRWO, images", "IRWO, sequences", "IRWO, recurrent"):
        assert in_two.of(case)[0]["record"].outliers.any()
    assert in_two.of("nobody can be helped")[0]["record"].fallback
    assert not in_two.of("IRW")[0]["record"].fallback
