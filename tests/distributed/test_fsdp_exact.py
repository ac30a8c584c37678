"""N processes that share one model's parameters make the update of one process with all of them."""

from __future__ import annotations

import pytest
import torch
from sharded_trainings import CAN_SHARD, ShardedTraining
from torch import nn
from trainings import Training, check_the_update_of_one

from irw_optim import DBSCANFilter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_SHARD, reason="refused with this torch"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning"),
]

REMOVES_SOME = DBSCANFilter(quantile=0.8)
WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
CROSS_ENTROPY = nn.CrossEntropyLoss
KEPT = {"reshard_after_forward": False}

CASES = {
    "IRW": ShardedTraining(),
    "kept after forward": ShardedTraining(fsdp=KEPT),
    "kept in part": ShardedTraining(fsdp={"reshard_after_forward": 2}),
    "one group": ShardedTraining(layers="none"),
    "way 2": ShardedTraining(way=2),
    "way 2, kept after forward": ShardedTraining(way=2, fsdp=KEPT),
    "images": ShardedTraining("images"),
    "sequences": ShardedTraining("tagger"),
    "transformer": ShardedTraining("transformer"),
    "time first": ShardedTraining("time first"),
    "tied": ShardedTraining("tied"),
    "frozen": ShardedTraining("frozen"),
    "centre": ShardedTraining(irw={"center": 1.0}),
    "class balance": ShardedTraining(irw={"class_balance": True}),
    "mix": ShardedTraining(irw={"mix": 0.3}),
    "warm-up": ShardedTraining(irw={"warmup_steps": 2}),
    "CVaR": ShardedTraining(irw={"weighting": "cvar"}),
    "last layer": ShardedTraining(irw={"score_parameters": "last"}),
    "last layer of what autodiff covers": ShardedTraining("gru", irw={"score_parameters": "last"}),
    "sum": ShardedTraining(criterion=CROSS_ENTROPY(reduction="sum"), steps=2),
    "class weights, ignored": ShardedTraining(criterion=CROSS_ENTROPY(WEIGHTS), ignored=True),
    "IRWO": ShardedTraining(irw={"outliers": REMOVES_SOME}),
    "IRWO, kept after forward": ShardedTraining(irw={"outliers": REMOVES_SOME}, fsdp=KEPT),
    "IRWO, images": ShardedTraining("images", irw={"outliers": REMOVES_SOME}),
    "IRWO, transformer": ShardedTraining("transformer", irw={"outliers": REMOVES_SOME}),
    "three passes": ShardedTraining(passes=3),
    "30 steps": ShardedTraining(steps=30, lr=0.03, irw={"warmup_steps": 10}),
}
IN_FOUR = ["IRW", "time first", "IRWO", "three passes", "kept in part"]


@pytest.mark.parametrize(("case", "ranks"), [(c, 2) for c in CASES] + [(c, 4) for c in IN_FOUR])
def test_sharded_processes_make_the_update_of_one(case, ranks, request):
    outcomes = request.getfixturevalue("in_two" if ranks == 2 else "in_four").of(case)
    check_the_update_of_one(outcomes, CASES[case].alone(ranks))


def test_the_weights_make_a_difference_that_a_wrong_step_would_show(in_two):
    """The same steps with the weights of plain averaging end elsewhere."""
    plain = Training(irw={"weighting": "uniform"}).alone(2)["parameters"]
    weighted = in_two.of("IRW")[0]["parameters"]
    assert (plain - weighted).norm() > 0.05 * plain.norm()
