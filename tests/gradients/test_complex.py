"""Complex parameters: the inner product of two gradients is Re<conj(a), b>, as a step feels it."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor, nn

from irw_optim import DBSCANFilter, IRWOptimizer, verify
from irw_optim.gradients import MaterializedGradients, PerSampleGradients
from irw_optim.gradients.autodiff import AutodiffGradients, materialized_by_loop

B, N = 12, 8


class Spectral(nn.Module):
    """Real and complex layers, by turns."""

    def __init__(self) -> None:
        super().__init__()
        bins = N // 2 + 1
        self.before = nn.Linear(N, N)
        self.filter = nn.Parameter(torch.randn(bins, dtype=torch.cfloat))
        self.mixing = nn.Linear(bins, bins, dtype=torch.cfloat)
        self.shift = nn.Parameter(torch.randn(bins))
        self.after = nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.before(x)) * self.filter + self.shift
        spectrum = self.mixing(spectrum) + self.filter.conj() * x[:, :1]
        return self.after(torch.fft.irfft(spectrum, n=N)) + spectrum.abs().sum(1, keepdim=True)


def made() -> tuple[nn.Module, Tensor]:
    model = Spectral()
    for module in model.modules():  # .double() would make complex numbers real
        for name, p in list(module.named_parameters(recurse=False)):
            wider = torch.cdouble if p.is_complex() else torch.double
            setattr(module, name, nn.Parameter(p.detach().to(wider)))
    return model, torch.randn(B, N).double()


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean(1)


def flat(tensors: list[Tensor]) -> Tensor:
    """A complex number as its two parts."""
    return torch.cat(
        [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).flatten() for t in tensors]
    )


def rows_of(losses: Tensor, parameters: list[Tensor]) -> Tensor:
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([flat(list(row)) for row in rows])


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
def test_a_step(engine):
    model, x = made()
    parameters = list(model.parameters())
    losses = losses_of(model, x)
    truth = reference.decide(losses.detach(), rows_of(losses, parameters), 0.3)
    sgd = torch.optim.SGD(parameters, lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.3, model=model, engine=engine)
    G, old = rows_of(losses_of(model, x), parameters), flat([p.detach() for p in parameters])
    optimizer.backward(losses_of(model, x))
    record = optimizer.last_step
    assert record.scores.dtype == torch.float64
    assert reference.error(record.scores, truth.scores) < 1e-9
    assert reference.error(record.weights, truth.weights) < 1e-9
    assert reference.error(flat([p.grad for p in parameters]), truth.weights @ G) < 1e-9
    optimizer.step()
    new = flat([p.detach() for p in parameters])
    assert reference.error(new, old - 0.1 * (truth.weights @ G)) < 1e-9


def by_rows(losses: Tensor, parameters: list[Tensor]) -> PerSampleGradients:
    return AutodiffGradients(losses, parameters, {"row_by_row": True})


@pytest.mark.parametrize("engine", [AutodiffGradients, by_rows, materialized_by_loop])
def test_the_three_products(engine):
    model, x = made()
    parameters = list(model.parameters())
    G = rows_of(losses_of(model, x), parameters)
    u, v = torch.randn(B).double(), {p: torch.randn_like(p) for p in parameters}
    gradients = engine(losses_of(model, x), parameters)
    combined = gradients.combine(u)
    assert [combined[p].dtype for p in parameters] == [p.dtype for p in parameters]
    assert reference.error(flat([combined[p] for p in parameters]), u @ G) < 1e-10
    assert reference.error(gradients.dot(v), G @ flat(list(v.values()))) < 1e-10
    some = {p: v[p] if p.is_complex() else torch.zeros_like(p) for p in parameters}
    alone = gradients.dot({p: v[p] for p in parameters if p.is_complex()})
    assert reference.error(alone, G @ flat(list(some.values()))) < 1e-10
    assert reference.error(gradients.gram(), G @ G.T) < 1e-10


def test_outliers():
    model, x = made()
    x[3] *= 50
    outliers = DBSCANFilter(eps="auto", min_samples=3)
    y = torch.randint(3, (B,))
    report = verify(model, x, y, nn.CrossEntropyLoss(), outliers=outliers, repeats=1)
    assert report.exact
    assert report.tolerance < 1e-8


def test_rows_that_somebody_else_made():
    weight = torch.zeros(2, dtype=torch.cfloat, requires_grad=True)
    rows = torch.tensor([[1 + 1j, 0], [1j, 2]])
    gradients = MaterializedGradients({weight: rows})
    assert gradients.gram().tolist() == [[2, 1], [1, 5]]
    assert gradients.dot({weight: torch.tensor([1j, 1j])}).tolist() == [1, 1]
    assert gradients.combine(torch.tensor([1.0, 2.0]))[weight].tolist() == [1 + 3j, 4]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_half_of_complex_is_widened():
    weight = torch.zeros(1, dtype=torch.complex32)
    rows = torch.tensor([[300 + 0j], [0 + 300j]]).to(torch.complex32)
    gram = MaterializedGradients({weight: rows}).gram()
    assert gram.dtype == torch.float32
    assert gram.tolist() == [[90000, 0], [0, 90000]]


def test_ghost_alone_refuses_by_name():
    model, x = made()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.3, model=model, engine="ghost")
    with pytest.raises(RuntimeError, match=r"does not cover .*filter"):
        optimizer.backward(losses_of(model, x))
