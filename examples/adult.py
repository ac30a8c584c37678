"""Ten ways to train on UCI Adult, compared in one call: `make demo`.

Trains a small network to predict whether a person earns more than 50,000 dollars a year, from
features without race and sex, and looks at what each remedy does to the people of each group.
Prints a table and what may be concluded from it, and writes both with a figure to an HTML file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from adult_data import load_adult
from torch import nn

from irw_optim import DBSCANFilter, compare_remedies
from irw_optim.metrics import group_accuracy
from irw_optim.remedies import REMEDIES, Comparison, Fitted, Training

REPORT = Path(__file__).parents[1] / "build" / "adult-report.html"
INNER = {"sgd": partial(torch.optim.SGD, lr=0.1), "adam": partial(torch.optim.Adam, lr=0.001)}


def network(features: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )


def cvar(training: Training) -> Fitted:
    """The mean of the worst losses of a batch."""
    return training.fit(irw={"alpha": training.alpha, "weighting": "cvar"})


def irwo(training: Training) -> Fitted:
    """IRW without the outliers of each batch."""
    return training.fit(irw={"alpha": training.alpha, "outliers": DBSCANFilter()})


def compare(options: argparse.Namespace) -> tuple[Comparison, str]:
    """The remedies of the library and two more; and the accuracy of race × sex under each."""
    people, test = load_adult()
    result = compare_remedies(
        partial(network, people.features.shape[1]),
        nn.CrossEntropyLoss(),
        (people.features, people.labels),
        (test.features, test.labels),
        groups=test.groups[["income", "sex"]],
        remedies={**REMEDIES, "CVaR": cvar, "IRWO": irwo},
        seeds=options.seeds,
        epochs=options.epochs,
        batch_size=256,
        optimizer=INNER[options.optimizer],
        alpha=options.alpha,
    )
    race = test.groups[["race", "sex"]]
    by_race = {
        remedy: np.mean([min(group_accuracy(test.labels, one, race).values()) for one in predicted])
        for remedy, predicted in result.predictions.items()
    }
    return result, (100 * pd.Series(by_race)).round(1).to_string()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many (%(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="of each training (%(default)s)")
    parser.add_argument("--alpha", type=float, default=0.3, help="share in (0, 1] (%(default)s)")
    parser.add_argument("--optimizer", choices=INNER, default="sgd", help="inner (%(default)s)")
    parser.add_argument("--output", type=Path, default=REPORT, help="HTML file (%(default)s)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # matrices this small only wait for a second thread
    result, by_race = compare(options)
    print(result)
    print(f"\nThe worst group of race × sex, mean over the seeds, in %\n\n{by_race}")
    result.to_html(options.output)
    print(f"\nThe report, with a figure, is in {options.output.resolve()}")


if __name__ == "__main__":
    main()
