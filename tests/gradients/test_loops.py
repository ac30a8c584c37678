"""Training loops that bite: what happens between forward and step, against the loop."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree, gradient_errors
from models import OnceDifferentiable
from torch import Tensor, nn
from zoo import CASES

from irw_optim import IRWOptimizer

ALPHA = 0.4


def mlp() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3), nn.Tanh())
    return model.double()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4).double(), torch.randint(3, (size,))


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def wrapped(model: nn.Module, parameters=None, **options) -> IRWOptimizer:
    sgd = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=0.1)
    return IRWOptimizer(sgd, **{"alpha": ALPHA, "model": model, **options})


def attached(model: nn.Module, **options) -> tuple[IRWOptimizer, nn.Module]:
    criterion = nn.CrossEntropyLoss()
    return wrapped(model, criterion=criterion, **options), criterion


def truth_of(model: nn.Module, *data: Tensor, **options) -> reference.Step:
    """The loop on a copy of the model without hooks."""
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    for ours, its in zip(model.parameters(), twin.parameters(), strict=True):
        its.requires_grad_(ours.requires_grad)
    trainable = [p for p in twin.parameters() if p.requires_grad]
    return reference.step(losses_of(twin, *data), trainable, ALPHA, **options)


def gradients_agree(model: nn.Module, *gradients: list[Tensor]) -> None:
    """Every p.grad is the sum of these."""
    total = [sum(parts) for parts in zip(*gradients, strict=True)]
    errors = gradient_errors(model, total)
    assert max(errors.values()) < 1e-9, errors


class TestForwards:
    def test_forwards_that_are_thrown_away(self):
        model = mlp()
        optimizer, criterion = attached(model)
        data = batch()
        for _ in range(3):
            criterion(model(torch.randn(9, 4).double()), torch.zeros(9).long())
            with torch.no_grad():
                model(torch.randn(2, 4).double())
        criterion(model(data[0]), data[1]).backward()
        agree(optimizer, model, truth_of(model, *data))

    def test_other_forwards_between_forward_and_backward(self):
        model = mlp()
        optimizer, criterion = attached(model)
        data = batch()
        loss = criterion(model(data[0]), data[1])
        with torch.no_grad():
            model(torch.randn(6, 4).double())
        model(torch.randn(6, 4).double())
        loss.backward()
        agree(optimizer, model, truth_of(model, *data))

    @pytest.mark.parametrize("sizes", [(6, 6), (6, 4), (1, 6)])
    @pytest.mark.parametrize("at_once", [False, True], ids=["two backwards", "one backward"])
    def test_two_forwards_before_backward(self, sizes, at_once):
        model = mlp()
        optimizer, criterion = attached(model)
        both = [batch(size) for size in sizes]
        for _ in range(3):
            optimizer.zero_grad()
            losses = [criterion(model(x), y) for x, y in both]
            if at_once:
                sum(losses).backward()
            else:
                for loss in reversed(losses):
                    loss.backward()
            gradients_agree(model, *(truth_of(model, *data).gradients for data in both))

    @pytest.mark.parametrize("sizes", [(6, 6), (6, 4), (1, 6), (3, 3)])
    def test_one_batch_in_two_forwards(self, sizes):
        model = mlp()
        optimizer = wrapped(model)
        both = [batch(size) for size in sizes]
        whole = tuple(map(torch.cat, zip(*both, strict=True)))
        optimizer.backward(torch.cat([losses_of(model, *data) for data in both]))
        agree(optimizer, model, truth_of(model, *whole))

    def test_pairs_through_one_model(self):
        model, (x, _), (z, _) = mlp(), batch(), batch()

        def distances(net):
            return (net(x) - net(z)).square().sum(1)

        truth = reference.step(distances(model), model.parameters(), ALPHA)
        optimizer = wrapped(model)
        optimizer.backward(distances(model))
        agree(optimizer, model, truth)

    def test_batches_of_every_size(self):
        model = mlp()
        optimizer = wrapped(model)
        for size in (6, 1, 4, 13, 2, 6):
            data = batch(size)
            truth = truth_of(model, *data)
            optimizer.zero_grad()
            optimizer.backward(losses_of(model, *data))
            agree(optimizer, model, truth)
            optimizer.step()

    def test_an_empty_batch_row_by_row(self):
        """Where an operation has no double backward, autodiff takes a pass for each sample."""
        layer = nn.Linear(4, 3).double()
        optimizer = wrapped(layer, engine="autodiff")
        for size in (6, 0):
            optimizer.zero_grad()
            x = torch.randn(size, 4).double()
            optimizer.backward(OnceDifferentiable.apply(layer(x)).square().sum(1))
        assert optimizer.last_step.weights.shape == (0,)
        assert not any(p.grad is not None and p.grad.any() for p in layer.parameters())


class TestBackwards:
    def test_retain_graph_and_a_second_backward_add_up(self):
        model, data = mlp(), batch()
        _, criterion = attached(model)
        for repeat in (1, 2, 3):  # the engine checks itself at the 1st, 2nd and 4th pass
            loss = criterion(model(data[0]), data[1])
            loss.backward(retain_graph=True)
            loss.backward()
            gradients_agree(model, *[truth_of(model, *data).gradients] * 2 * repeat)

    def test_a_second_backward_without_retain_graph_says_so(self):
        model, (x, y) = mlp(), batch()
        _, criterion = attached(model)
        loss = criterion(model(x), y)
        loss.backward()
        before = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=r"retain_graph=True"):
            loss.backward()
        assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))

    def test_autograd_grad(self):
        model, data = mlp(), batch()
        optimizer, criterion = attached(model)
        loss = criterion(model(data[0]), data[1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert all(p.grad is None for p in model.parameters())
        truth = truth_of(model, *data)
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        agree(optimizer, model, truth)

    def test_autograd_grad_of_some_parameters(self):
        model, data = mlp(), batch()
        _, criterion = attached(model)
        chosen = [model[2].weight]
        (gradient,) = torch.autograd.grad(criterion(model(data[0]), data[1]), chosen)
        assert reference.error(gradient, truth_of(model, *data).gradients[2]) < 1e-9

    def test_backward_with_inputs(self):
        model, data = mlp(), batch()
        _, criterion = attached(model)
        criterion(model(data[0]), data[1]).backward(inputs=[model[2].weight])
        assert model[0].weight.grad is None
        assert reference.error(model[2].weight.grad, truth_of(model, *data).gradients[2]) < 1e-9

    @pytest.mark.parametrize("zero_grad", ["optimizer", "model"])
    def test_zero_grad_between_forward_and_backward(self, zero_grad):
        model, data = mlp(), batch()
        optimizer, criterion = attached(model)
        loss = criterion(model(data[0]), data[1])
        {"optimizer": optimizer, "model": model}[zero_grad].zero_grad()
        truth = truth_of(model, *data)
        loss.backward()
        agree(optimizer, model, truth)
        optimizer.step()

    def test_gradients_of_the_input(self):
        model, (x, y) = mlp(), batch()
        optimizer, criterion = attached(model)
        x.requires_grad_()
        truth = truth_of(model, x.detach(), y)
        by_sample = x.detach().clone().requires_grad_()
        twin_losses = losses_of(copy.deepcopy(model).eval(), by_sample, y)
        (expected,) = torch.autograd.grad(twin_losses.mean(), by_sample)  # nobody weighs these
        criterion(model(x), y).backward()
        agree(optimizer, model, truth)
        assert reference.error(x.grad, expected) < 1e-9

    @pytest.mark.parametrize("engine", ["auto", "autodiff"])
    def test_hooks_on_parameters_are_called_once(self, engine):
        model, data = mlp(), batch()
        _, criterion = attached(model, engine=engine)
        after = []
        model[2].weight.register_hook(lambda g: g / 2)
        model[2].weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
        truth = truth_of(model, *data).gradients
        criterion(model(data[0]), data[1]).backward()
        gradients_agree(model, [truth[0], truth[1], truth[2] / 2, truth[3]])
        assert [reference.error(g, truth[2] / 2) < 1e-9 for g in after] == [True]

    def test_hooks_on_parameters_see_nothing_but_the_final_gradient(self):
        model, data = mlp(), batch()
        _, criterion = attached(model)
        seen = []
        model[2].weight.register_hook(seen.append)
        criterion(model(data[0]), data[1]).backward()
        truth = truth_of(model, *data).gradients[2]
        assert [reference.error(g, truth) < 1e-9 for g in seen] == [True]

    def test_eval_mode_is_plain_training(self):
        model, (x, y) = mlp().eval(), batch()
        optimizer, criterion = attached(model)
        loss = criterion(model(x), y)
        loss.backward()
        expected = torch.autograd.grad(losses_of(model, x, y).mean(), list(model.parameters()))
        gradients_agree(model, list(expected))
        assert optimizer.last_step is None
        with pytest.raises(RuntimeError, match=r"without weights.*train mode"):
            optimizer.step()


class TestParameters:
    def test_freezing_and_thawing_in_mid_training(self):
        model = mlp()
        optimizer = wrapped(model)
        for frozen in ([], ["0.weight", "0.bias"], ["0.weight", "2.bias"], []):
            for name, p in model.named_parameters():
                p.requires_grad_(name not in frozen)
            data = batch()
            truth = truth_of(model, *data)
            optimizer.zero_grad()
            optimizer.backward(losses_of(model, *data))
            agree(optimizer, model, truth)
            optimizer.step()

    @pytest.mark.parametrize("chosen", [("2.weight", "2.bias"), ("0.weight",)])
    def test_an_optimizer_over_some_of_the_parameters(self, chosen):
        model, data = mlp(), batch()
        parameters = dict(model.named_parameters())
        optimizer = wrapped(model, [parameters[name] for name in chosen])
        scored = [name in chosen for name in parameters]
        twin = mlp()
        twin.load_state_dict(model.state_dict())
        all_of_twin = list(twin.parameters())
        truth = reference.step(
            losses_of(twin, *data),
            all_of_twin,
            ALPHA,
            scored=[p for p, used in zip(all_of_twin, scored, strict=True) if used],
        )
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer.backward(losses_of(model, *data))
        agree(optimizer, model, truth)
        optimizer.step()
        moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
        assert moved == set(chosen)

    @pytest.mark.parametrize(
        ("score_parameters", "chosen"),
        [
            ("last", ("2.weight", "2.bias")),
            (["0"], ("0.weight", "0.bias")),
            (lambda name, p: p.ndim == 1, ("0.bias", "2.bias")),
        ],
        ids=["last", "names", "predicate"],
    )
    def test_score_parameters(self, score_parameters, chosen):
        model, data = mlp(), batch()
        optimizer = wrapped(model, score_parameters=score_parameters)
        twin = mlp()
        twin.load_state_dict(model.state_dict())
        scored = [p for name, p in twin.named_parameters() if name in chosen]
        truth = reference.step(losses_of(twin, *data), twin.parameters(), ALPHA, scored=scored)
        optimizer.backward(losses_of(model, *data))
        agree(optimizer, model, truth)

    def test_two_optimizers_on_one_model(self):
        model, first, second = mlp(), batch(), batch(4)
        one, its_criterion = attached(model)
        other = wrapped(model, alpha=0.4)
        truths = truth_of(model, *first), truth_of(model, *second)
        its_criterion(model(first[0]), first[1]).backward()
        agree(one, model, truths[0])
        other.zero_grad()
        other.backward(losses_of(model, *second))
        agree(other, model, truths[1])
        other.detach()
        one.zero_grad()
        its_criterion(model(first[0]), first[1]).backward()
        agree(one, model, truths[0])

    def test_a_plain_optimizer_beside_it(self):
        model, data = mlp(), batch()
        optimizer, criterion = attached(model)
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        losses_of(model, *data).mean().backward()
        expected = torch.autograd.grad(losses_of(model, *data).mean(), list(model.parameters()))
        gradients_agree(model, list(expected))
        plain.step()
        plain.zero_grad()
        truth = truth_of(model, *data)
        criterion(model(data[0]), data[1]).backward()
        agree(optimizer, model, truth)


class TestWhatBeginsLater:
    """What was right in the first steps may be wrong in a later one."""

    def steps(self, case, batches):
        """One backward pass for each batch, equal to the loop."""
        model = CASES[case].model().double()
        optimizer = wrapped(model)
        for inputs in batches:

            def losses_of(net, inputs=inputs):
                output = net(*inputs)
                pattern = torch.linspace(-1, 1, output.numel()).view_as(output).cos()
                return (output - pattern).square().flatten(1).sum(1)

            truth = reference.step(losses_of(model), model.parameters(), ALPHA)
            optimizer.zero_grad()
            optimizer.backward(losses_of(model))
            agree(optimizer, model, truth)

    def test_centring_that_is_switched_on(self):
        def forward(self, x, centre):
            h = self.first(x)
            return self.second(h - h.mean(0) if centre else h)

        centred = CASES["centred by the batch"].model()
        type(centred).forward = forward
        model = centred.double()
        optimizer = wrapped(model)
        for step in range(6):
            x = torch.randn(6, 4).double()
            pattern = torch.arange(24.0).view(6, 4).cos()
            losses = [(model(x, step > 3) - pattern).square().sum(1) for _ in range(2)]
            truth = reference.step(losses[0], model.parameters(), ALPHA)
            optimizer.zero_grad()
            optimizer.backward(losses[1])
            agree(optimizer, model, truth)

    def test_a_permutation_that_begins_unseen(self):
        """Nothing but its numbers tells one permutation from another: no step relies on it."""
        x = [torch.randn(6, 4).double() for _ in range(12)]
        orders = [torch.arange(6)] * 5 + [torch.tensor([1, 2, 0, 4, 5, 3])] * 7
        self.steps("sorted and back", zip(x, orders, strict=True))

    def test_a_sequence_as_long_as_the_batch_among_others(self):
        lengths = (4, 3, 5, 4, 6, 2, 6)
        self.steps("time first", [(torch.randn(6, t, 4).double(),) for t in lengths])

    def test_a_batch_as_large_as_the_sequence_is_long(self):
        sizes = (6, 3, 6, 5, 4, 6, 4)
        self.steps("positions (T, D)", [(torch.randint(7, (b, 4)),) for b in sizes])

    def test_a_batch_that_divides_the_length_of_the_sequence(self):
        sizes = (5, 5, 5, 4, 3, 2, 1)
        self.steps("positions (T, D), square", [(torch.randint(7, (b, 6)),) for b in sizes])


class TestLog:
    """What is exact but slower is said once; what is quick says nothing."""

    @pytest.mark.parametrize(
        ("case", "level", "words"),
        [
            ("in-place ReLU", None, ()),
            ("BatchNorm, train", "INFO", ("autodiff", "1.weight", "1.bias")),
            ("LSTM", None, ()),
            ("centred by the batch", "INFO", ("first.weight", "autodiff")),
            ("no double backward", "WARNING", ("double backward", "score_parameters")),
        ],
    )
    def test_choice_and_reason(self, caplog, case, level, words):
        caplog.set_level("INFO", "irw_optim")
        model = CASES[case].model().double()
        optimizer = wrapped(model)
        for _ in range(5):
            (x,) = CASES[case].inputs()
            optimizer.backward(model(x.double()).square().flatten(1).sum(1))
        if level is None:
            assert not caplog.records
            return
        said = [r.getMessage() for r in caplog.records if r.levelname == level]
        assert len([text for text in said if all(word in text for word in words)]) == 1
        assert len(said) == len(set(said))


@pytest.mark.parametrize("case", ["BatchNorm and dropout", "TransformerEncoderLayer", "LSTM"])
def test_autocast(case):
    """bfloat16 keeps 8 bits; the loop rounds its gradients to them, and so the scores differ."""
    model = CASES[case].model()
    twin = copy.deepcopy(model)
    (x,) = CASES[case].inputs()

    def losses_of(net):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float().square().flatten(1).sum(1)

    try:
        losses = losses_of(twin)
    except RuntimeError as error:
        pytest.skip(f"no bfloat16 on this processor, by torch: {error}")
    truth = reference.step(losses, twin.parameters(), ALPHA)
    optimizer = wrapped(model)
    optimizer.backward(losses_of(model))
    agree(optimizer, model, truth, 3e-2)


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
def test_reentrant_checkpointing_is_refused_by_name(engine):
    """Where the losses are made: before a backward pass has written anything."""
    model, criterion = CASES["checkpointing"].model().double(), nn.MSELoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion, engine=engine)
    x = torch.randn(6, 4).double().requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        criterion(model(x, reentrant=True), x.detach())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.backward(model(x, reentrant=True).square().sum(1))
    assert optimizer.last_step is None
    assert not any(p.grad is not None for p in model.parameters())
    criterion(model(x), x.detach()).backward()
    assert optimizer.last_step is not None


def test_the_input_of_a_layer_changed_in_place_afterwards_is_refused():
    model = CASES["two inputs"].model().double()
    optimizer = wrapped(model)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    output = model(x, y)
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"in.?place"):
        optimizer.backward(output.square().sum(1))


class Reversible(torch.autograd.Function):
    """As reversible layers do: the part of the model runs again, with a backward of its own."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block, ctx.x = block, x.detach()
        return block(ctx.x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.block(x), gradient)
        return x.grad, None


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_backward_inside_of_a_function_is_refused_by_name(engine, steps):
    """What it adds to ``p.grad`` is of no single sample, and in no graph."""
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "block": nn.Linear(4, 4)})
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, engine=engine, accumulation_steps=steps)
    x = torch.randn(6, 4)

    def reversible():
        for _ in range(steps):
            h = Reversible.apply(model["first"](x), model["block"])
            optimizer.backward(h.square().sum(1))

    with pytest.raises(RuntimeError, match="ReversibleBackward: its backward calls"):
        reversible()
    assert not any(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    for _ in range(steps):
        optimizer.backward(model["block"](model["first"](x)).square().sum(1))
    assert optimizer.last_step is not None
