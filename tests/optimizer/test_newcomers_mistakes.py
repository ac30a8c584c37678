"""Mistakes that a newcomer makes: each error names the cause, and the line that mends it.

Each case is code as somebody would write it by mistake, and what the message must have: the name
of what is wrong first, then the line to write instead. The mended code runs at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import DBSCANFilter, IRWMonitor, IRWOptimizer, PerSampleLoss, verify
from irw_optim.schemes import GlobalScheme


class World:
    """What a training script has before the optimizer is wrapped."""

    def __init__(self) -> None:
        self.model = mlp(4, 5, 3, act=nn.ReLU)
        self.criterion = nn.CrossEntropyLoss()
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.x, self.y = torch.randn(6, 4), torch.randint(3, (6,))
        self.loader = DataLoader(TensorDataset(self.x, self.y), batch_size=3)

    def wrap(self, optimizer: object = None, **options: object) -> IRWOptimizer:
        options = {"alpha": 0.3, "model": self.model, "criterion": self.criterion, **options}
        return IRWOptimizer(self.sgd if optimizer is None else optimizer, **options)

    def losses(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def backward(self) -> None:
        self.criterion(self.model(self.x), self.y).backward()


def alpha_in_per_cent(w):
    w.wrap(alpha=30)


def the_parameters_in_place_of_an_optimizer(w):
    w.wrap(w.model.parameters())


def the_class_of_an_optimizer(w):
    w.wrap(torch.optim.SGD)


def an_optimizer_over_another_model(w):
    w.wrap(model=nn.Linear(4, 3))


def a_list_of_models(w):
    w.wrap(model=[w.model])


def wrapped_twice(w):
    w.wrap(w.wrap())


def the_class_of_a_criterion(w):
    w.wrap(criterion=nn.CrossEntropyLoss)


def a_function_as_criterion(w):
    w.wrap(criterion=F.cross_entropy)


def a_criterion_without_reduction(w):
    w.wrap(criterion=nn.CrossEntropyLoss(reduction="none"))


def a_criterion_without_its_model(w):
    w.wrap(model=None)


def one_criterion_for_two_models(w):
    first, other = w.wrap(), nn.Linear(4, 3)
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    IRWOptimizer(second, alpha=0.3, model=other, criterion=first.criterion)


def irwo_as_a_weighting(w):
    w.wrap(weighting="irwo")


def the_class_of_a_filter(w):
    w.wrap(outliers=DBSCANFilter)


def a_share_of_warm_up(w):
    w.wrap(warmup_steps=0.1)


def a_layer_that_there_is_not(w):
    w.wrap(score_parameters=["head.weight"])


def the_model_left_in_eval_mode(w):
    optimizer = w.wrap()
    w.model.eval()
    w.backward()
    optimizer.step()


def forgotten_backward(w):
    optimizer = w.wrap()
    w.criterion(w.model(w.x), w.y)
    optimizer.step()


def a_functional_loss_in_the_loop(w):
    optimizer = w.wrap()
    F.cross_entropy(w.model(w.x), w.y).backward()
    optimizer.step()


def the_loss_before_the_optimizer(w):
    loss = w.criterion(w.model(w.x), w.y)
    optimizer = w.wrap()
    loss.backward()
    optimizer.step()


def only_alpha(w):
    optimizer = IRWOptimizer(w.sgd, alpha=0.3)
    w.backward()
    optimizer.step()


def two_optimizers_on_one_model(w):
    first = w.wrap()
    second = w.wrap(torch.optim.Adam(w.model.parameters()))
    w.backward()
    second.step()
    w.backward()
    first.step()


def wrapped_before_the_parameters_are_replaced(w):
    optimizer = w.wrap()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        w.model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    w.x = w.x.double()
    w.backward()
    optimizer.step()


def the_mean_to_backward(w):
    optimizer = w.wrap(criterion=None)
    optimizer.backward(w.losses().mean())


def losses_without_their_graph(w):
    optimizer = w.wrap(criterion=None)
    with torch.no_grad():
        losses = w.losses()
    optimizer.backward(losses)


def losses_in_the_place_of_a_closure(w):
    optimizer = w.wrap()
    w.backward()
    optimizer.step(w.losses())


def class_balance_without_labels(w):
    optimizer = w.wrap(criterion=None, class_balance=True)
    optimizer.backward(w.losses())


def a_loader_that_does_not_go_through_the_scheme(w):
    optimizer = w.wrap()
    scheme = GlobalScheme(optimizer, w.loader)
    for x, y in w.loader:
        w.criterion(w.model(x), y).backward()
        optimizer.step()
    scheme.detach()


def a_monitor_on_the_inner_optimizer(w):
    IRWMonitor(w.sgd)


def a_loader_to_verify(w):
    verify(w.model, w.loader, w.y, w.criterion)


MISTAKES: list[tuple[Callable[[World], None], str, str]] = [
    (alpha_in_per_cent, "alpha=30", "alpha=0.2"),
    (the_parameters_in_place_of_an_optimizer, "optimizer=", "SGD(model.parameters(), lr=0.1)"),
    (the_class_of_an_optimizer, "optimizer=", "SGD(model.parameters(), lr=0.1)"),
    (an_optimizer_over_another_model, "not the model's", "SGD(model.parameters(), lr=0.1)"),
    (a_list_of_models, "model=", "torch.nn.ModuleList([first, second])"),
    (wrapped_twice, "optimizer is an IRWOptimizer already", "IRWOptimizer(optimizer.inner, ...)"),
    (the_class_of_a_criterion, "criterion=CrossEntropyLoss is", "criterion=CrossEntropyLoss()"),
    (a_function_as_criterion, "criterion=<function", "torch.nn.CrossEntropyLoss()"),
    (a_criterion_without_reduction, "reduction='none'", "reduction='mean'"),
    (a_criterion_without_its_model, "criterion is given without model", "model=model"),
    (one_criterion_for_two_models, "criterion=CrossEntropyLoss()", "call detach()"),
    (irwo_as_a_weighting, "weighting='irwo'", "outliers=DBSCANFilter()"),
    (the_class_of_a_filter, "outliers=DBSCANFilter is a class", "outliers=DBSCANFilter()"),
    (a_share_of_warm_up, "warmup_steps=0.1", "warmup_steps=len(loader)"),
    (a_layer_that_there_is_not, "score_parameters names 'head.weight'", "it has 0.weight"),
    (the_model_left_in_eval_mode, "the model is in eval mode", "model.train()"),
    (forgotten_backward, "step() found no gradient", "criterion(model(x), y).backward()"),
    (a_functional_loss_in_the_loop, "a gradient without weights", "on the very criterion of"),
    (the_loss_before_the_optimizer, "a gradient without weights", "called after that line"),
    (only_alpha, "no criterion is attached", "model=model, criterion=criterion)"),
    (two_optimizers_on_one_model, "gradient without weights", "not given to a newer IRWOptimizer"),
    (wrapped_before_the_parameters_are_replaced, "parameter", "make both optimizers anew"),
    (the_mean_to_backward, "losses has shape ()", 'reduction="none"'),
    (losses_without_their_graph, "losses do not require a gradient", "without .detach()"),
    (losses_in_the_place_of_a_closure, "closure is a Tensor", "step(losses=losses)"),
    (class_balance_without_labels, "class_balance=True", "backward(losses, labels=labels)"),
    (a_loader_that_does_not_go_through_the_scheme, "which samples", "for batch in scheme"),
    (a_monitor_on_the_inner_optimizer, "optimizer is a SGD", "IRWMonitor(IRWOptimizer(...))"),
    (a_loader_to_verify, "inputs is a DataLoader", "next(iter(loader))"),
]


@pytest.mark.parametrize(
    ("mistake", "cause", "mend"), MISTAKES, ids=[mistake.__name__ for mistake, *_ in MISTAKES]
)
def test_the_error_names_the_cause_and_the_line_that_mends_it(mistake, cause, mend):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        mistake(World())
    message = str(raised.value)
    assert cause in message
    assert mend in message[message.index(cause) + len(cause) :]


@pytest.mark.parametrize("zeroing", ["optimizer", "inner", "model"])
def test_the_inner_optimizer_steps_and_the_warm_up_does_not_end(zeroing, caplog):
    w = World()
    optimizer = w.wrap(warmup_steps=2)
    for _ in range(20):
        {"optimizer": optimizer, "inner": w.sgd, "model": w.model}[zeroing].zero_grad()
        w.backward()
        w.sgd.step()
    (record,) = caplog.records
    assert "warmup_steps=2 counts the steps of this IRWOptimizer" in record.getMessage()
    assert "expected its step(), not that of the optimizer inside it" in record.getMessage()


def test_no_such_word_where_its_steps_are_taken(caplog):
    w = World()
    optimizer = w.wrap(torch.optim.LBFGS(w.model.parameters(), lr=0.1), warmup_steps=2)

    def closure():
        optimizer.zero_grad()
        loss = w.criterion(w.model(w.x), w.y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    w = World()
    optimizer = w.wrap(warmup_steps=30)
    for _ in range(40):
        w.backward()
        optimizer.step()
        w.model.zero_grad()
    assert not caplog.records


@pytest.mark.parametrize("passes", [1, 8])
def test_batches_of_one_sample_are_not_weighed(passes, caplog):
    w = World()
    optimizer = w.wrap(accumulation_steps=passes)
    for _ in range(40):
        for x, y in zip(w.x.split(1)[:8], w.y.split(1)[:8], strict=True):
            w.criterion(w.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (passes == 1)
    assert all("one sample each, whose weight is 1" in words for words in said)


def test_what_the_messages_say_to_write_runs() -> None:
    w = World()
    optimizer = w.wrap(outliers=DBSCANFilter(), warmup_steps=len(w.loader))
    IRWMonitor(optimizer).detach()
    w.model.train()
    for x, y in [*w.loader, *w.loader]:
        optimizer.zero_grad()
        w.criterion(w.model(x), y).backward()
        optimizer.step()
    optimizer.detach()
    again = IRWOptimizer(
        optimizer.inner,
        alpha=0.2,
        model=w.model,
        criterion=PerSampleLoss(lambda output, y: F.cross_entropy(output, y, reduction="none")),
    )
    again.criterion(w.model(w.x), w.y).backward()
    again.step()
    again.detach()
    inputs, targets = next(iter(w.loader))
    assert verify(w.model, inputs, targets, w.criterion, repeats=1).exact
    several = nn.ModuleList([w.model, nn.Linear(3, 3)])
    both = torch.optim.SGD(several.parameters(), lr=0.1)
    balanced = IRWOptimizer(both, alpha=0.2, model=several, class_balance=True)
    losses = F.cross_entropy(several[1](several[0](w.x)), w.y, reduction="none")
    balanced.backward(losses, labels=w.y)
    balanced.step()


def test_a_model_that_is_converted_in_place_after_the_line_is_the_same_model() -> None:
    """`model.to(device)` keeps its parameters, so wrapping before it is no mistake."""
    torch.manual_seed(0)
    before = World()
    torch.manual_seed(0)
    after = World()
    optimizer = before.wrap()
    for w in (before, after):
        w.model.to(torch.float64)
        w.x = w.x.double()
    for w, o in ((before, optimizer), (after, after.wrap())):
        w.backward()
        o.step()
    assert all(map(torch.equal, before.model.parameters(), after.model.parameters()))
