"""Small models of each kind that DP training meets, in float64, with data that fits them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import models
import torch
from opacus import GradSampleModule
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import Tensor, nn

from irw_optim.privacy import IRWDPConfig, IRWDPOptimizer

CLASSES = 3
CONFIG = IRWDPConfig(init_threshold=math.log(CLASSES))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.lstm = DPLSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = DPMultiheadAttention(8, 2, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.feed_forward = models.mlp(8, 16, 8, act=nn.GELU)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        h = self.norms[0](self.embedding(tokens))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head((h + self.feed_forward(self.norms[1](h))).mean(1))


def mlp():
    return models.mlp(6, 8, CLASSES)


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def tokens(n, generator):
    return torch.randint(0, 11, (n, 5), generator=generator)


def numbers(*shape):
    return lambda n, generator: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


ZOO = {
    "mlp": (mlp, numbers(6)),
    "cnn_group_norm": (cnn, numbers(2, 8, 8)),
    "embedding_lstm": (Recurrent, tokens),
    "transformer": (Transformer, tokens),
}


@dataclass
class Setting:
    """A private model with an optimizer whose noise is off, and a batch."""

    model: nn.Module
    optimizer: IRWDPOptimizer
    criterion: nn.Module
    x: Tensor
    y: Tensor

    def backward(self, rows: Any = slice(None)) -> Tensor:
        """Forward and backward on some rows; their losses go to the optimizer by the criterion."""
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(self.x[rows]), self.y[rows])
        loss.backward()
        return loss


def setting(
    kind: str,
    n: int = 8,
    *,
    config: IRWDPConfig = CONFIG,
    noise_multiplier: float = 0.0,
    max_grad_norm: float = 0.5,
    optimizer_class: type[IRWDPOptimizer] = IRWDPOptimizer,
    lr: float = 0.1,
    criterion: nn.Module | None = None,
    **options: Any,
) -> Setting:
    torch.manual_seed(0)
    build, draw = ZOO[kind]
    generator = torch.Generator().manual_seed(1)
    criterion = criterion or nn.CrossEntropyLoss()
    model = GradSampleModule(build().double(), loss_reduction=criterion.reduction)
    optimizer = optimizer_class(
        torch.optim.SGD(model.parameters(), lr=lr),
        irw=config,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=n,
        loss_reduction=criterion.reduction,
        **options,
    )
    optimizer.pending.follow(criterion, model, hooks=model)
    x = draw(n, generator)
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    return Setting(model, optimizer, criterion, x, y)


def aim(s: Setting) -> None:
    """Put the public state where it splits the batch: a random direction, middling thresholds."""
    generator = torch.Generator().manual_seed(2)
    optimizer = s.optimizer
    direction = {
        p: torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in optimizer.params
    }
    state = replace(optimizer.public_state, steps=5, direction=direction)
    s.backward()
    losses = optimizer.pending.losses()
    rows = optimizer.pending.rows(optimizer.params, len(losses))
    products = rows.dot(direction) / rows.norms()
    optimizer.public_state = replace(
        state,
        threshold=losses.quantile(0.6).item(),
        scale=products[products > 0].quantile(0.5).item(),
    )
    optimizer.zero_grad()
