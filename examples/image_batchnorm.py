"""A ResNet with BatchNorm on images of digits, two of which are rare.

    python examples/image_batchnorm.py                     # about a minute on one core
    python examples/image_batchnorm.py --save digits.png   # and whom the weights favoured

In training mode BatchNorm makes every sample's loss depend on the whole batch, so the gradient of
one sample's loss goes through the others too. Many tools for per-sample gradients refuse such a
model. `IRWOptimizer` notices, says so once, and takes the exact way; `verify` shows it here.

The images are the 8 x 8 digits that scikit-learn ships. Nine in ten of the eights and nines are
taken out of the training images, and none out of the test images.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from irw_optim import IRWOptimizer, verify
from irw_optim.metrics import group_accuracy

BATCH_SIZE, LEARNING_RATE, TRAINING_IMAGES = 64, 0.05, 1200
RARE, KEPT = (8, 9), 0.1


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(inside, outside, 1, stride=2, bias=False), nn.BatchNorm2d(outside)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, 16),
        Block(16, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


Images = tuple[Tensor, Tensor]


def rare_digits(seed: int) -> tuple[Images, Images]:
    """Training and test images of shape (N, 1, 8, 8) in [0, 1], with their labels."""
    images, digits = load_digits(return_X_y=True)
    x = torch.from_numpy(images / 16).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(digits).long()
    draw = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(len(x), generator=draw).tensor_split([TRAINING_IMAGES])
    rare = torch.isin(y[train], torch.tensor(RARE))
    train = train[~rare | (torch.rand(len(train), generator=draw) < KEPT)]
    return (x[train], y[train]), (x[test], y[test])


def methods(steps: int) -> dict[str, dict[str, Any]]:
    """The options of `IRWOptimizer` that make each; plain averaging is one of them."""
    return {
        "plain": {"weighting": "uniform"},
        "class-balanced": {"weighting": "uniform", "class_balance": True},
        "IRW": {},
        "IRW, mix 0.5": {"mix": 0.5},
        "IRW, balanced": {"class_balance": True, "warmup_steps": steps // 3},
    }


def train(images: Images, epochs: int, seed: int, method: str) -> tuple[nn.Module, Tensor]:
    """An ordinary loop; returns the model, and the weight each image had in the last epoch."""
    x, y = images
    steps = epochs * -(-len(x) // BATCH_SIZE)
    torch.manual_seed(seed)
    model, criterion = resnet(), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9),
        alpha=0.3,
        model=model,
        criterion=criterion,
        **methods(steps)[method],
    )
    scheduler = CosineAnnealingLR(optimizer, steps)
    weights = torch.zeros(len(x))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH_SIZE):
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
            scheduler.step()
            weights[batch] = len(batch) * optimizer.last_step.weights
    optimizer.detach()
    return model.eval(), weights


@torch.no_grad()
def judge(model: nn.Module, images: Images) -> dict[str, float]:
    """Accuracies on the test images, in %."""
    x, y = images
    predicted = model(x).argmax(1)
    by_digit = 100 * pd.Series(group_accuracy(y, predicted, groups=y))
    return {
        "accuracy": 100 * float((predicted == y).float().mean()),
        "eights and nines": by_digit[list(RARE)].mean(),
        "worst digit": by_digit.min(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save", type=Path, help="a picture of the images with the most weight")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("irw_optim").setLevel(logging.ERROR)  # it would say so in every training

    (x, y), _ = rare_digits(seed=0)
    print("Is it exact with BatchNorm in training mode? One batch against a loop over its images:")
    torch.manual_seed(0)
    print(verify(resnet(), x[:16], y[:16], nn.CrossEntropyLoss()))

    rows = []
    for seed in range(options.seeds):
        training, test = rare_digits(seed)
        for method in methods(1):
            model, weights = train(training, options.epochs, seed, method)
            rows.append({"method": method, **judge(model, test)})
            if method == "IRW" and seed == 0 and options.save:
                draw(training, weights).savefig(options.save, dpi=100)
    judged = pd.DataFrame(rows).groupby("method", sort=False)
    mean, sd = (table.map("{:.1f}".format) for table in (judged.mean(), judged.std(ddof=0)))
    print("\nOn the test images, in %, mean ± sd over the seeds:")
    print((mean + " ± " + sd).to_string())


def draw(images: Images, weights: Tensor, count: int = 20) -> Any:
    """The images that weighed most in the last epoch: 1 is what plain training gives everybody."""
    x, y = images
    heaviest = weights.argsort(descending=True)[:count]
    figure, axes = plt.subplots(2, count // 2, figsize=(11, 3), layout="constrained")
    for axis, i in zip(axes.flat, heaviest.tolist(), strict=True):
        axis.imshow(x[i, 0].numpy(), cmap="gray_r")
        axis.set_title(f"{int(y[i])}, weight {weights[i]:.0f}", fontsize=9)
        axis.set_axis_off()
    return figure


if __name__ == "__main__":
    main()
