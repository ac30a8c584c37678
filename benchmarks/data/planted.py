"""Structure planted in real data, so that the groups are known: a shortcut, a minority.

`coloured_digits`: the colour tells the class 19 times in 20, and the groups are label x colour.
`marked_adult`: 1 in 20 people carry a mark that turns their label round.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from benchmarks.data.sources import Samples, Source, adult, flipped

SHORTCUT, MINORITY = 0.95, 0.05


def coloured_digits(seed: int, noise: float = 0.0) -> tuple[Samples, Samples, Samples]:
    """scikit-learn's digits in red or green: is it 5 or more? The colour agrees in most cases.

    Training and validation part are drawn alike. Every test image comes in both colours: the
    accuracies inside the groups are then of the same images, and accuracy is that of even groups.
    ``noise`` is the share of wrongly recorded labels outside the test part, as of `split`.
    """
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(digits))
    train, validation, test = np.split(order, [len(order) // 2, 3 * len(order) // 4])
    labels = (digits >= 5).astype(np.int64)
    colours = np.where(generator.random(len(labels)) < SHORTCUT, labels, 1 - labels)
    recorded = flipped(pd.Series(labels), noise, generator).to_numpy()
    both, test_colours = np.concatenate([test, test]), np.repeat([0, 1], len(test))
    return (
        _coloured(images[train], recorded[train], colours[train]),
        _coloured(images[validation], recorded[validation], colours[validation]),
        _coloured(images[both], labels[both], test_colours),
    )


def _coloured(images: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> Samples:
    """Images (N, 64) in the channel that the colour names, the other one black: (N, 128)."""
    channels = np.zeros((len(images), 2, images.shape[1]), np.float32)
    channels[np.arange(len(images)), colours] = images / 16
    names = [f"{label}, {colour}" for label in ("< 5", ">= 5") for colour in ("red", "green")]
    x, y = torch.from_numpy(channels.reshape(len(images), -1)), torch.from_numpy(labels)
    groups = {"label x colour": torch.from_numpy(2 * labels + colours)}
    return Samples(x, y, groups, {"label x colour": names})


def marked_adult() -> Source:
    """Adult with a mark on a random share of the people, for whom the label is the other one.

    The mark is a feature: the minority's rule can be learned, but the average hardly asks for it.
    """
    source = adult()
    marked = np.random.default_rng(0).random(len(source.label)) < MINORITY
    return replace(
        source,
        features=source.features.assign(mark=marked.astype(float)),
        numbers=[*source.numbers, "mark"],
        label=source.label.where(~marked, 1 - source.label),
        sensitive=source.sensitive.assign(mark=np.where(marked, "marked", "unmarked")),
        groupings={"mark": ["mark"], "label x mark": ["label", "mark"]},
    )
