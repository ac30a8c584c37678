"""Weights of a whole data set over several processes: those of one process, and its training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import ranked
import torch
from global_trainings import Chosen, Drawn, data_set
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from trainings import mlp

from irw_optim import DBSCANFilter, PerSampleLoss
from irw_optim.schemes import ResamplingSampler, global_weights

pytestmark = pytest.mark.slow

REMOVES_SOME = DBSCANFilter(quantile=0.8, min_samples=3)


@dataclass
class Weights:
    """`global_weights` of a model that nobody trains."""

    options: dict[str, Any]
    size: int = 37
    double: bool = True
    inside: bool = False
    """Whether it is given the module inside of the DDP, on rank 1 alone."""
    duplicates: bool = False
    """Whether some samples are there twice: whichever of two is in S, the weights are the same."""
    tied: bool = False
    """Whether all losses are exactly 0, so that S is chosen by the indices alone."""
    ignored: slice | None = None
    """Samples whose target is ignored."""
    wrapped: bool = False
    """Whether it is given a module with the DDP inside."""

    def __call__(self, rank: int = 0, world_size: int = 1) -> Tensor | None:
        torch.manual_seed(5)
        model: nn.Module = mlp().double() if self.double else mlp()
        if self.tied:
            for parameter in model[-1].parameters():
                nn.init.zeros_(parameter)
        data = data_set(self.size, self.duplicates)
        if self.ignored is not None:
            data.tensors[1][self.ignored] = -100
        if not self.double:
            data.tensors = data.tensors[0].float(), data.tensors[1]
        if self.inside and rank != world_size - 1:
            return None
        if world_size > 1 and not self.inside:
            model = DistributedDataParallel(model)
        if self.wrapped:
            model = nn.Sequential(model, nn.Identity())
        loader = DataLoader(data, batch_size=5 if world_size > 1 else 8, shuffle=True)
        arguments = {"alpha": 0.3, "progress": False, **self.options}
        criterion = PerSampleLoss(own_output) if self.tied else nn.CrossEntropyLoss()
        return global_weights(model, criterion, loader, **arguments)


def own_output(output: Tensor, target: Tensor) -> Tensor:
    """Of a sample's own class: 0 where the last layer is, and with a gradient all the same."""
    return output.gather(1, target[:, None]).squeeze(1)


WEIGHTS = {
    "IRW": Weights({}),
    "float32": Weights({}, double=False),
    "centre": Weights({"center": 1.0}),
    "class balance": Weights({"class_balance": True}),
    "within classes": Weights({"within_classes": True, "mix": 0.2}),
    "within classes, ignored": Weights(
        {"within_classes": True, "outliers": REMOVES_SOME}, ignored=slice(0, None, 3)
    ),
    "mix": Weights({"mix": 0.2}),
    "ties": Weights({}, tied=True),
    "duplicates": Weights({}, duplicates=True),
    "duplicates, class balance": Weights({"class_balance": True}, duplicates=True),
    "all worst off": Weights({"alpha": 1.0}),
    "last layer": Weights({"score_parameters": "last"}),
    "autodiff": Weights({"engine": "autodiff"}),
    "ignored targets": Weights({"mix": 0.2}, ignored=slice(0, None, 3)),
    "ignored by one process": Weights({"class_balance": True, "center": 1.0}, ignored=slice(20)),
    "ignored, IRWO": Weights(
        {"outliers": REMOVES_SOME, "outlier_block": 9}, ignored=slice(0, None, 3)
    ),
    "IRWO": Weights({"outliers": REMOVES_SOME, "outlier_block": 9}),
    "IRWO, one block": Weights({"outliers": REMOVES_SOME}),
    "three samples": Weights({}, size=3),
    "one sample": Weights({"class_balance": True}, size=1),
    "the module inside": Weights({}, inside=True),
    "the module around": Weights({}, wrapped=True, size=36),
}
STEPS = {"refresh": 3, "unit": "steps"}
TRAININGS = {
    "reweighting": Chosen(scheme=STEPS),
    "way 2": Chosen(scheme=STEPS, way=2),
    "put in DDP later": Chosen(scheme=STEPS, around=False),
    "IRWO and options": Chosen(
        scheme={**STEPS, "outlier_block": 20},
        irw={"outliers": REMOVES_SOME, "center": 0.5, "mix": 0.1, "class_balance": True},
    ),
    "CVaR": Chosen(scheme=STEPS, irw={"weighting": "cvar", "alpha": 0.05}),
    "warm-up": Chosen(scheme=STEPS, irw={"warmup_steps": 4}),
    "distributed sampler": Drawn(scheme={"refresh": 1}),
    "resampling": Drawn(scheme={**STEPS, "use": "resampling"}, size=36),
}


def unknown_samples(rank: int, world_size: int) -> None:
    """On rank 1 alone."""
    training = Chosen()
    training.begin(world_size, DataLoader(data_set(), batch_size=8))
    x, y = data_set().tensors
    training.global_scheme.select(torch.arange(4) + 36 * rank)
    training.step(x[:4], y[:4])


def not_told(rank: int, world_size: int) -> None:
    training = Chosen()
    training.begin(world_size, DataLoader(data_set(), batch_size=8))
    training.global_scheme.renew()
    x, y = data_set().tensors
    if rank == 0:
        training.global_scheme.select(torch.arange(4))
    training.step(x[:4], y[:4])


def not_finite(rank: int, world_size: int) -> None:
    data = data_set()
    data.tensors[0][30] = torch.nan
    model = DistributedDataParallel(mlp().double())
    global_weights(model, nn.CrossEntropyLoss(), DataLoader(data), alpha=0.2, progress=False)


def disordered(rank: int, world_size: int) -> None:
    """One sample is put last in its batch: few batches, all of them of one rank."""

    def collate(samples: list[Any]) -> Any:
        marked = [sample for sample in samples if sample[0][0] > 50]
        rest = [sample for sample in samples if sample[0][0] <= 50]
        return default_collate(rest + marked)

    data = data_set()
    data.tensors[0][30, 0] = 100
    model = DistributedDataParallel(mlp().double())
    loader = DataLoader(data, batch_size=4, collate_fn=collate)
    global_weights(model, nn.CrossEntropyLoss(), loader, alpha=0.2, progress=False)


def other_data(rank: int, world_size: int) -> None:
    model = DistributedDataParallel(mlp().double())
    loader = DataLoader(data_set(30 + rank))
    global_weights(model, nn.CrossEntropyLoss(), loader, alpha=0.2, progress=False)


def other_seed(rank: int, world_size: int) -> None:
    training = Drawn(scheme={"use": "resampling", "seed": rank})
    training.begin(world_size, DataLoader(data_set()))
    training.global_scheme.renew()


def local(rank: int, world_size: int) -> Any:
    """Each batch's weights sum to 1 in its own process."""
    outcome = Chosen(scheme=STEPS, irw={"worst_off": "local"}, steps=1)(rank, world_size)
    return outcome["samples"], outcome["weights"], outcome["record"]


def draws(rank: int, world_size: int) -> list[list[int]]:
    weights = torch.arange(20.0)
    sampler = ResamplingSampler(weights, 24)
    epochs = [list(sampler) for _ in range(2)]
    sampler.set_epoch(0)
    return [*epochs, list(sampler), list(ResamplingSampler(weights, 24, rank=0, world_size=1))]


CASES: dict[str, ranked.Case] = {
    **WEIGHTS,
    **{f"training: {name}": training for name, training in TRAININGS.items()},
    "local": local,
    "draws": draws,
    "not finite": not_finite,
    "disordered": disordered,
    "other data": other_data,
    "other seed": other_seed,
    "unknown samples": unknown_samples,
    "not told": not_told,
}
IN_FOUR = ["IRW", "IRWO", "three samples", "one sample", "draws", "training: reweighting"]
IN_FOUR += ["training: resampling", "training: distributed sampler", "training: IRWO and options"]


def ranks_of(cases):
    return [(case, 2) for case in cases] + [(case, 4) for case in cases if case in IN_FOUR]


@pytest.mark.parametrize(("case", "ranks"), ranks_of(WEIGHTS))
def test_the_weights_are_those_of_one_process(case, ranks, request):
    outcomes = request.getfixturevalue("in_two" if ranks == 2 else "in_four").of(case)
    expected = WEIGHTS[case]()
    bound = 1e-11 if WEIGHTS[case].double else 1e-5
    for weights in outcomes[-1:] if WEIGHTS[case].inside else outcomes:
        assert torch.equal(weights, outcomes[-1])
        assert weights.shape == expected.shape
        assert (weights - expected).abs().max() <= bound * expected.max()


def test_some_of_them_have_outliers():
    assert (WEIGHTS["IRWO"]() == 0).sum() > (WEIGHTS["IRW"]() == 0).sum()


@pytest.mark.parametrize(("case", "ranks"), ranks_of(f"training: {name}" for name in TRAININGS))
def test_several_processes_train_like_one(case, ranks, request):
    outcomes = request.getfixturevalue("in_two" if ranks == 2 else "in_four").of(case)
    expected = CASES[case].alone(ranks)
    for outcome in outcomes:
        assert torch.equal(outcome["parameters"], outcomes[0]["parameters"]), "ranks apart"
        assert torch.equal(outcome["weights"], outcomes[0]["weights"]), "weights apart"
        for name in ("parameters", "weights", "scores"):
            difference = (outcome[name] - expected[name]).norm()
            assert difference <= 1e-9 * expected[name].norm(), name


def test_a_record_covers_the_batch_of_all_processes(in_two):
    outcomes = in_two.of("training: reweighting")
    whole = torch.cat([outcome["samples"] for outcome in outcomes])
    for outcome in outcomes:
        record = outcome["record"]
        assert torch.equal(whole[record.own], outcome["samples"])
        held = outcome["weights"][whole]
        torch.testing.assert_close(record.weights, held / held.sum())


def test_local_renormalises_in_each_process_by_itself(in_two):
    for samples, weights, record in in_two.of("local"):
        assert record.own is None
        torch.testing.assert_close(record.weights, weights[samples] / weights[samples].sum())


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_draws_of_all_ranks_are_those_of_one_process(ranks, request):
    outcomes = request.getfixturevalue("in_two" if ranks == 2 else "in_four").of("draws")
    first, second, again, alone = zip(*outcomes, strict=True)
    expected = draws(0, 1)
    for epoch, of_one in zip((first, second, again), expected[:3], strict=True):
        together = [index for part in zip(*epoch, strict=True) for index in part]
        assert together == of_one
    assert list(alone) == [expected[0]] * ranks


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        ("not finite", ["the losses of 1 samples are not finite (dataset indices 30)"] * 2),
        ("disordered", ["in an order of its own, or others: the losses of the same samples"] * 2),
        ("other data", ["samples in the data set differs between the processes: [30, 31]"] * 2),
        ("other seed", ["ValueError: seed differs between the processes: [0, 1]"] * 2),
        ("unknown samples", ["another process does not know", "indices 36 to 39, but the weights"]),
        ("not told", ["another process does not know", "does not know which samples this batch"]),
    ],
)
def test_every_rank_says_what_is_wrong(in_two, case, texts):
    for traceback, text in zip(in_two.raised(case), texts, strict=True):
        assert text in traceback


# Resuming -------------------------------------------------------------------------------------

USES = {
    "reweighting": Drawn(scheme={"refresh": 1}, size=32),
    "resampling": Drawn(scheme={"refresh": 3, "unit": "steps", "use": "resampling"}, size=32),
}
BROKEN = {use: replace(training, stop=6) for use, training in USES.items()}  # of 4 an epoch
ENDED = {use: replace(training, epochs=1) for use, training in USES.items()}
KINDS = {"straight": USES, "broken": BROKEN, "ended": ENDED}


@dataclass
class Loading:
    """Takes a state over, and no step: what one rank refuses, another may take."""

    training: Drawn

    def __call__(self, rank: int, world_size: int) -> str:
        self.training.begin(world_size, self.training.loader(data_set(32), rank, world_size, 2))
        try:
            self.training.resume(rank)
        except ValueError as error:
            return str(error)
        return "taken"


@pytest.fixture(scope="module")
def first_half(tmp_path_factory):
    cases = {(use, kind): KINDS[kind][use] for use in USES for kind in KINDS}
    return ranked.run(cases, 2, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def resumed(first_half, tmp_path_factory):
    cases: dict[Any, ranked.Case] = {}
    for use, training in USES.items():
        second = replace(training, first=1)
        own = [outcome["states"] for outcome in first_half.of((use, "broken"))]
        ended, broken = (kind[use].alone(2)["states"] for kind in (ENDED, BROKEN))
        cases[use, "own"] = replace(second, states=own)
        cases[use, "of one process"] = replace(second, states=[ended])
        cases[use, "load rank 0's"] = Loading(replace(second, states=own[:1]))
        cases[use, "load one process's"] = Loading(replace(second, states=[broken]))
    reweighted = first_half.of(("reweighting", "broken"))[0]["states"]
    cases["reweighting", "rank 0's"] = replace(USES["reweighting"], first=1, states=[reweighted])
    return ranked.run(cases, 2, tmp_path_factory.mktemp("second"))


@pytest.mark.parametrize(
    "case", [("reweighting", "own"), ("resampling", "own"), ("reweighting", "rank 0's")], ids=str
)
def test_a_broken_epoch_goes_on_as_if_it_had_not_been(first_half, resumed, case):
    straight, _ = first_half.of((case[0], "straight"))
    for outcome in resumed.of(case):
        assert torch.equal(outcome["parameters"], straight["parameters"])
        assert torch.equal(outcome["weights"], straight["weights"])


@pytest.mark.parametrize("use", USES)
def test_between_epochs_another_number_of_processes_goes_on(first_half, resumed, use):
    straight = first_half.of((use, "straight"))[0]["parameters"]
    states = first_half.of((use, "ended"))[0]["states"]
    in_one = replace(USES[use], states=[states], first=1).alone(2)["parameters"]
    assert (in_one - straight).norm() <= 1e-9 * straight.norm()
    for outcome in resumed.of((use, "of one process")):
        assert (outcome["parameters"] - straight).norm() <= 1e-9 * straight.norm()


def test_the_middle_of_another_processs_epoch_is_refused(resumed):
    text = "is from the middle of an epoch with {}, and here it is {}: expected the same"
    assert resumed.of(("reweighting", "load rank 0's")) == ["taken"] * 2
    first, second = resumed.of(("resampling", "load rank 0's"))
    assert first == "taken"
    assert text.format("rank=0", 1) in second
    for use in USES:
        for said in resumed.of((use, "load one process's")):
            assert text.format("world_size=1", 2) in said
