"""What is written into a part of a tensor, or read from another view of its storage.

The graph does not tell which part, so such operations are watched in every step: the products are
quick where they keep the samples apart, and the step is the loop's wherever they do not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irw_optim import IRWOptimizer

B, T, D = 6, 4, 3

Operation = Callable[[Tensor, int], Tensor]


def behind_a_token(h: Tensor, step: int) -> Tensor:
    out = h.new_zeros(B, T + 1, D)
    out[:, 1:] = h
    out[:, 0] = h.mean(1)
    return out


def masked_in_another_order(h: Tensor, step: int) -> Tensor:
    of_heads = (h * 2).view(B, T, D, 1).permute(2, 0, 3, 1)
    of_heads *= torch.linspace(0, 1, T, dtype=h.dtype)
    return of_heads.tanh().permute(1, 3, 0, 2).squeeze(-1)


def time_first(h: Tensor, step: int) -> Tensor:
    out = h.new_zeros(T, B, D)
    out[1:] = h.transpose(0, 1)[:-1]
    return out.transpose(0, 1)


def windows(h: Tensor, step: int) -> Tensor:
    return h.contiguous().as_strided((B, T - 1, 2, D), (T * D, D, D, 1)).prod(2)


def without_a_margin(h: Tensor, step: int) -> Tensor:
    """From an offset on, and not to the end."""
    return h.contiguous().as_strided((B, T - 2, D), (T * D, D, 1), D) * 2


def in_place_of_some(h: Tensor, step: int) -> Tensor:
    h = h.clone()
    h[:, 1:3].mul_(h[:, :2].detach().exp()).tanh_()
    return h


APART: dict[str, Operation] = {
    "behind a token": behind_a_token,
    "masked in another order": masked_in_another_order,
    "time first": time_first,
    "windows": windows,
    "without a margin": without_a_margin,
    "in place of some": in_place_of_some,
}


def rolled(h: Tensor, step: int) -> Tensor:
    out = h.clone()
    out[1:] = h[:-1]
    return out


def read_across(h: Tensor, step: int) -> Tensor:
    """Windows that reach into the next sample."""
    return F.pad(h, (0, 0, 0, 0, 0, 1)).as_strided((B, T + 1, D), (T * D, D, 1)).tanh()


def at_places_that_vary(h: Tensor, step: int) -> Tensor:
    """Each its own row at first, and from the sixth step on another's."""
    order = torch.arange(B) if step < 5 else torch.arange(B).roll(1)
    out = h.new_zeros(B, 2, D)
    out[:, 0][order] = h[:, 0]
    out[:, 1] = h[:, 1]
    return out


def of_another_layout(h: Tensor, step: int) -> Tensor:
    """The same view of storage in which the samples lie elsewhere, from the sixth step on."""
    h = h[:, :2, 0]
    stored = h.contiguous() if step < 5 else h.t().contiguous().t()
    return stored.as_strided((B, 2), (2, 1)).tanh()[..., None].expand(B, 2, D)


def of_a_parameter(h: Tensor, step: int) -> Tensor:
    out = h.new_zeros(B, T, D)
    out[:, :] = torch.linspace(0, 1, D, dtype=h.dtype, requires_grad=True) * h.mean()
    return out + h


MEETING: dict[str, Operation] = {
    "rolled": rolled,
    "read across": read_across,
    "at places that vary": at_places_that_vary,
    "of another layout": of_another_layout,
    "of all samples": of_a_parameter,
}


class Net(nn.Module):
    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 3)
        self.operation, self.steps = operation, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.operation(self.first(x), self.steps)
        self.steps += 1
        return self.last(h).square().mean(1)


def errors_by_step(model: Net, steps: int) -> list[float]:
    torch.manual_seed(0)
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.1), alpha=0.3, model=model)
    errors = []
    for _ in range(steps):
        x, y = torch.randn(B, T, D).double(), torch.randint(3, (B,))
        twin = Net(model.operation).double()
        twin.load_state_dict(model.state_dict())
        twin.steps = model.steps
        losses = F.cross_entropy(twin(x), y, reduction="none")
        truth = reference.step(losses, list(twin.parameters()), 0.3)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
        found = [p.grad for p in model.parameters()]
        expected = truth.gradients
        errors.append(
            max(
                float((g - e).norm() / e.norm().clamp(min=1e-9))
                for g, e in zip(found, expected, strict=True)
            )
        )
        optimizer.step()
    return errors


@pytest.mark.parametrize("name", APART)
def test_samples_that_stay_apart_have_quick_products(name, caplog):
    caplog.set_level(logging.INFO, "irw_optim")
    assert max(errors_by_step(Net(APART[name]).double(), 7)) < 1e-10
    assert not [r.getMessage() for r in caplog.records if "autodiff" in r.getMessage()]


@pytest.mark.parametrize("name", MEETING)
def test_samples_that_meet_are_exact_at_once(name):
    assert max(errors_by_step(Net(MEETING[name]).double(), 9)) < 1e-10
