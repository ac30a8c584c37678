"""Directions that are parts of one long message, as processes send them to each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from irw_optim.gradients.engine import Engine
from irw_optim.gradients.loss_gradients import LossGradients


class Additions(nn.Module):
    """Parameters that the module uses itself: whole, and in part; attention reads rows of one."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 6)
        self.positions = nn.Parameter(torch.randn(1, 7, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x) + self.positions[:, 2:5]
        scaled = self.scale * h
        return self.attention(h, scaled, scaled, need_weights=False)[0]


def test_a_direction_may_be_a_part_of_a_message() -> None:
    torch.manual_seed(0)
    model = Additions().double()
    engine = Engine(model, "ghost")
    losses = model(torch.randn(5, 3, 4).double()).square().mean((1, 2))
    batch = LossGradients(engine, losses)
    batch.start(torch.ones((), dtype=torch.float64), keep_graph=True)
    rows = batch.rows(lambda _: True)
    direction = rows.combine(torch.rand(5).double())
    message = torch.cat([part.flatten() for part in direction.values()])
    pieces = message.split([part.numel() for part in direction.values()])
    parts = {p: piece.view(p.shape) for p, piece in zip(direction, pieces, strict=True)}
    torch.testing.assert_close(rows.dot(parts), rows.dot(direction))


def test_parameters_may_be_parts_of_one_tensor() -> None:
    """As in a flattened model: their own storage does not begin with them."""
    torch.manual_seed(0)
    model = Additions().double()
    everything = torch.cat([p.detach().flatten() for p in model.parameters()])
    pieces = everything.split([p.numel() for p in model.parameters()])
    for p, piece in zip(model.parameters(), pieces, strict=True):
        p.data = piece.view(p.shape)
    engine = Engine(model, "ghost")
    losses = model(torch.randn(5, 3, 4).double()).square().mean((1, 2))
    batch = LossGradients(engine, losses)
    batch.start(torch.ones((), dtype=torch.float64), keep_graph=True)
    weights = torch.rand(5).double()
    truth = torch.autograd.grad(losses, list(model.parameters()), weights)
    found = batch.rows(lambda _: True).combine(weights)
    for p, gradient in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(found[p], gradient)
