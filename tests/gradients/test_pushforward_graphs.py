"""Changes through what users build themselves: functions in Python, views written to, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from pushes import Case, assert_case, assert_pushed, case, numbers, rows_of
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from irw_optim import IRWOptimizer
from irw_optim.gradients import places
from irw_optim.gradients.backward_passes import BackwardPasses
from irw_optim.gradients.forward import FORWARD
from irw_optim.gradients.graph import OfKinds, walk
from irw_optim.gradients.places import Places
from irw_optim.gradients.pushforward import NoPushForwardError, pull_back, push


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Parts(torch.autograd.Function):
    """Several inputs and outputs, a number among the inputs, an output without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        order = x.argsort()
        ctx.mark_non_differentiable(order)
        return x * y * factor, order, x + y

    @staticmethod
    def backward(ctx: Any, first: Tensor, _: Tensor, second: Tensor) -> Any:
        x, y = ctx.saved_tensors
        d_x = first * y * ctx.factor + second if ctx.needs_input_grad[0] else None
        d_y = first * x * ctx.factor + second if ctx.needs_input_grad[2] else None
        return d_x, None, d_y


class Straight(torch.autograd.Function):
    """Another gradient than the derivative: what counts is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-10, 10)


class WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient @ w.mT, x.mT @ gradient


class Once(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Detaching(Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient.detach()


class HalfDetaching(Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x**2 * gradient + x**2 * gradient.detach()


class Clipping(Cube):
    """Not linear in what it is given."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.1, 0.1)


class InNumpy(Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x, gradient = x.detach().cpu(), gradient.detach()
        slope = torch.from_numpy(3 * x.numpy() ** 2).to(gradient.device)
        return torch.from_numpy((slope * gradient).cpu().numpy()).to(gradient.device)


def _written(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[1:, ::2] = y.exp()
    z[0] *= x[1]
    z[:2, 1] += y[:, 1]
    z.diagonal().add_(1.5).mul_(y[0, 0])
    z.t()[2].copy_(x[:, 0] ** 2)
    return z.sin()


def _copied(x: Tensor, y: Tensor) -> Tensor:
    """In order, in another, from one number, and zeros."""
    z = x * 2
    z[1:, 1:3] = y
    z[1:, :2].t().copy_(y * 3)
    z[:, 3] = y[1, 1]
    z[2] = 0.0
    z[0, 1:].zero_()
    return z.sin()


def _copied_turned(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[:2, :2].t().copy_(y)
    return z[:2, :2]


def _written_by_a_function(x: Tensor, function: type[torch.autograd.Function]) -> Tensor:
    z = x + 1
    z[0].mul_(2)
    z[1] = function.apply(x[1])
    return z


def _in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z += y
    z *= 2
    z.clamp_(-3, 3).sigmoid_()
    z = z * 2
    z[z > 0.5] = 0.25
    z.index_add_(0, torch.tensor([0, 0]), y[:2]).masked_fill_(z < 0.3, 0.0)
    return torch.addmm(z[0], z, y.mT[:, :1].expand(4, 4), beta=2)


class Hooked(nn.Module):
    """A backward hook puts a function of torch's own around the module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.linear.register_full_backward_hook(lambda *_: None)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def _autocast(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        y = nn.functional.linear(x, w)
        return nn.functional.layer_norm(y, (3,)).float() + y


def _times_a_sparse_one(x: Tensor) -> Tensor:
    one = torch.eye(3, dtype=torch.float64).to_sparse()
    return torch.sparse.mm(one, x) + torch.mm(one, x)


GRAPHS = [
    case("module with a backward hook", lambda layer, x: layer(x), Hooked, (5, 4)),
    case("autocast", _autocast, (2, 4), (3, 4), dtype=torch.float32, tolerance=5e-2),
    case("sparse products", _times_a_sparse_one, (3, 4)),
    case("samples", lambda m, s: torch.distributions.Normal(m, s.exp()).rsample(), (3,), (3,)),
    case("samples of gamma", lambda a: torch.distributions.Gamma(a.exp(), 2.0).rsample(), (3,)),
    case("function", Cube.apply, (3, 4)),
    case("function of parts", lambda x, y: Parts.apply(x, 2.5, y), (4,), (4,)),
    case("one of the parts", lambda x, y: Parts.apply(x, 2.5, y)[2], (4,), (4,)),
    case("straight through", Straight.apply, (3, 4)),
    case("function with a setup", WithSetup.apply, (3, 4), (4, 2)),
    case("views written to", _written, (3, 4), (2, 2)),
    case("copies into views", _copied, (3, 4), (2, 2)),
    case(
        "a copy from another type",
        lambda x, y: _copied(x, y.float()),
        (3, 4),
        (2, 2),
        tolerance=1e-6,
    ),
    case(
        "a copy where many are alike",
        _copied_turned,
        (1000, 4),
        (2, 2),
        dtype=torch.bfloat16,
        tolerance=1e-2,
    ),
    case("function on a view", lambda x: _written_by_a_function(x, Cube), (3, 4)),
    case("in place", _in_place, (3, 4), (3, 4)),
    case(
        "numbers that are read twice", lambda x: (x @ x.mT) * x.sum() + x[:, :1] * x[0, 0], (3, 3)
    ),
    case(
        "expanded",
        lambda x: x.expand(3, 4).reshape(2, 6) @ x.expand(6, 4) * x.expand(2, 4),
        (1, 4),
    ),
    case("nothing arrives", lambda x, y: (x.detach() * y, y + x.round()), (3, 4), (3, 4)),
    case("leaf itself", lambda x: x, (3,)),
]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: case.name)
def test_equals_rows_of_autograd(case: Case, checkpointed: bool) -> None:
    assert_case(case, checkpointed=checkpointed)


@pytest.mark.parametrize("function", [Once, Detaching, HalfDetaching, Clipping, InNumpy])
@pytest.mark.parametrize("within", [lambda x, f: f.apply(x), _written_by_a_function])
def test_what_can_only_be_pulled_back_says_so(
    function: type[torch.autograd.Function],
    within: Callable[[Tensor, type[torch.autograd.Function]], Tensor],
) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NoPushForwardError):
        assert_pushed(numbers(within(x, function)), [x], 1e-10)


@pytest.mark.cpu("to look whether it is a copy would be to wait")
def test_copies_into_views_take_no_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    z = x * 2
    z[1:3] = y
    z[3] = 0.0
    output = z.sin().flatten()
    rows = rows_of(output, [x, y])
    monkeypatch.setattr(torch.autograd, "grad", None)
    pushed = BackwardPasses(output, walk(output), {}).push({x: x.detach(), y: y.detach()})
    expected = [(row[0] * x).sum() + (row[1] * y).sum() for row in rows]
    torch.testing.assert_close(pushed, torch.stack(expected).detach(), rtol=0.0, atol=1e-12)


def test_operations_without_double_backward_say_so() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    output = torch.segment_reduce(x, "sum", lengths=torch.tensor([2, 3]))
    with pytest.raises(NoPushForwardError, match="SegmentReduce"):
        assert_pushed(numbers(output), [x], 1e-10)


@pytest.mark.parametrize("nested", [False, True])
def test_recomputed_blocks(nested: bool) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.GELU(), nn.Dropout(), nn.LayerNorm(4)
    ).double()
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)

    def outer(y: Tensor) -> Tensor:
        inner = checkpoint(block, y, use_reentrant=False) if nested else block(y)
        return inner.exp()

    result = checkpoint(outer, x, use_reentrant=False)
    assert_pushed(numbers(result), [x, *block.parameters()], 1e-10)


def test_saved_tensors_elsewhere() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = nn.functional.layer_norm(x.exp() @ x.mT, (3,)).tanh()
    assert_pushed(numbers(y), [x], 1e-10)


@pytest.mark.parametrize("turned", [False, True])
def test_a_gradient_that_two_share_is_added_to_by_neither(turned: bool) -> None:
    """That of a sum, pulled back, is that of both terms."""
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    left, right = x.exp(), y.exp()
    total, product = left + right, left * right
    terms = [total, total.sin(), product, product.sin(), left.sin(), right.sin()]
    losses = torch.stack(terms[::-1] if turned else terms).sum((0, 2))
    cotangent = torch.randn(3, dtype=torch.float64)
    expected = torch.autograd.grad(losses, [x, y], cotangent, retain_graph=True)
    edges = [get_gradient_edge(leaf) for leaf in (x, y)]
    for found, right in zip(
        pull_back(losses, cotangent, edges, walk(losses)), expected, strict=True
    ):
        assert found is not None
        torch.testing.assert_close(found, right)


def test_hooks_do_not_hear_it() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = x.exp()
    heard: list[Tensor] = []
    output = (y * 2).sum(1)
    y.register_hook(heard.append)
    x.register_hook(heard.append)
    node = output.grad_fn
    assert node is not None
    node.register_hook(lambda *_: heard.append(x))
    (operation,) = Places([node], []).operations
    push(node, operation, [torch.ones(3, 4, dtype=torch.float64)])
    assert not heard


def test_a_rule_that_misses_what_another_version_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    def outdated(node: Any, tangents: object) -> Tensor:
        return node._saved_under_another_name  # type: ignore[no-any-return]

    monkeypatch.setitem(FORWARD, "Mul", outdated)
    assert_case(case("mul", torch.mul, (3, 4), (3, 1)))
    assert places.FORWARD is FORWARD


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.maximum(x, -x),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.nn.functional.unfold(x.view(1, 1, 3, 4), 2),
        lambda x: torch.view_as_complex(x.view(6, 2)),
        lambda x: torch.view_as_real(x * 1j),
        lambda x: (x * 1j).t(),
    ],
)
def test_goes_forwards_without_a_second_derivative(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    node: Any = function(x).grad_fn
    (operation,) = Places([node], []).operations
    read = [edge[0]._input_metadata[0] for edge in _read(node)]
    tangents = [torch.ones(tensor.shape, dtype=tensor.dtype) for tensor in read]
    monkeypatch.setattr(torch.autograd, "grad", None)
    assert push(node, operation, tangents)[0] is not None


def _read(node: Any) -> list[Any]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def test_nothing_is_freed() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    output = (x.logcumsumexp(1) * x.std(1, keepdim=True)).sum(1)
    assert_pushed(output, [x], 1e-10)
    assert_pushed(output, [x], 1e-10)
    output.sum().backward()


def test_what_is_known_of_graphs_does_not_outlive_their_types() -> None:
    first = nn.Linear(4, 5, bias=False)  # a shift in front of BatchNorm has no gradient
    model = nn.Sequential(first, nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), alpha=0.4, model=model)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)) * 2:
        model.to(dtype)
        for _ in range(2):
            x = torch.randn(6, 4, dtype=dtype)
            oracle = reference.step(model(x).square().sum(1), model.parameters(), 0.4)
            optimizer.zero_grad()
            optimizer.backward(model(x).square().sum(1))
            for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
                assert reference.error(p.grad, gradient) < tolerance


def test_kinds_of_graphs_do_not_fill_the_memory() -> None:
    known: OfKinds[int] = OfKinds()
    for kind in range(3 * OfKinds.MOST):
        known[kind] = known[kind] = kind
        assert known[kind] == kind
        assert len(known) <= OfKinds.MOST
    assert list(known) == list(range(2 * OfKinds.MOST, 3 * OfKinds.MOST))  # the newest
