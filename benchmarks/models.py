"""The models of all benchmarks, and the work whose cost is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between: inputs, hidden widths, classes."""
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Three convolutions with GroupNorm, of colour images."""
    widths, layers = (3, 32, 64, 64), []
    for i, (width, following) in enumerate(pairwise(widths)):
        convolution = nn.Conv2d(width, following, 3, stride=1 if i == 0 else 2, padding=1)
        layers += [convolution, nn.GroupNorm(8, following), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def small_cnn(pool: int | None = None) -> nn.Sequential:
    """Three convolutions of grey images of 8 x 8; of any size with a pool to 4 x 4."""
    pooled = [] if pool is None else [nn.AdaptiveAvgPool2d(pool)]
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1)]
    second = [nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    head = [nn.Flatten(), nn.Linear(32 * 16, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*first, *second, *pooled, *head)


class Transformer(nn.Module):
    """Token embeddings (and positions, given a length), encoder layers, their mean, a head."""

    def __init__(
        self, tokens: int, width: int = 32, layers: int = 2, wider: int = 2, length: int = 0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.randn(1, length, width) * 0.02) if length else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, wider * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if self.positions is not None:
            hidden = hidden + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.mean(1))


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, (N, classes), in evaluation mode."""
    training = model.training
    model.eval()
    outputs = torch.cat([model(part) for part in x.split(4096)])
    model.train(training)
    return outputs


def per_sample_gradients(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """G, (B, P), by torch.func; ``loss`` gives the losses of logits and labels."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (one[None],))
        return loss(output, label[None]).squeeze(0)

    rows = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(parameters, x, y)
    return torch.cat([block.flatten(1) for block in rows.values()], dim=1)


# Work whose cost is measured ------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One row of the table: a model, its batch, and how often a step is repeated in a timing."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    classes: int
    inner: int = 1

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and random class labels, always the same."""
        torch.manual_seed(1)
        inputs = self.inputs()
        return inputs, torch.randint(0, self.classes, (len(inputs),))

    def build(self) -> nn.Module:
        """The model, always with the same parameters."""
        torch.manual_seed(0)
        return self.model()


def small_mlp(batch: int) -> Work:
    """The MLP of the paper's tables, at some batch size."""
    name, inner = f"MLP 100-64-32-2, B = {batch}", max(1, 2000 // batch)
    return Work(name, lambda: mlp(100, 64, 32, 2), lambda: torch.randn(batch, 100), 2, inner)


def transformer(width: int, length: int, layers: int, batch: int) -> Work:
    """A transformer classifier."""
    return Work(
        f"Transformer, {layers} layers, d = {width}, T = {length}, B = {batch}",
        lambda: Transformer(1000, width, layers, wider=4, length=length),
        lambda: torch.randint(0, 1000, (batch, length)),
        2,
    )


_WIDTHS = (512, 1024, 1024, 512, 2)
TABLE = [
    *map(small_mlp, (64, 1024)),
    Work(f"MLP {'-'.join(map(str, _WIDTHS))}, B = 256", partial(mlp, *_WIDTHS),
         lambda: torch.randn(256, 512), 2),
    Work("CNN, 3 conv + GroupNorm, 32x32, B = 64", cnn, lambda: torch.randn(64, 3, 32, 32), 10),
    transformer(256, 64, 4, 16),
]  # fmt: skip
BATCHES, LENGTHS = [64, 256, 1024, 4096, 16384], [64, 128, 256, 512, 1024]
