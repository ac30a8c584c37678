"""The paper's claims (arXiv 2411.03068), one by one, against the runs that are stored.

The claims are those of the notes that the project was designed from, in words of our own.
A verdict follows from the numbers by a rule that stands beside the claim; nothing is typed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.fairness.analysis import (
    WITH,
    WITHOUT,
    Estimate,
    Target,
    estimate,
    protected,
    recovered_by_seed,
    targets,
)
from benchmarks.fairness.tables import (
    first_five,
    marked,
    mean_change,
    noisy_targets,
    points,
    share,
    spread,
    title,
)
from benchmarks.fairness.tasks import TASKS

HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold here"


@dataclass(frozen=True)
class Claim:
    """What the paper says, what was measured, and what follows.

    Attributes:
        says: the claim, in our words.
        measured: the numbers.
        rule: when it would hold, and when in part.
        verdict: one of `HOLDS`, `PARTLY`, `FAILS`.
    """

    says: str
    measured: str
    rule: str
    verdict: str

    def markdown(self) -> str:
        return (
            f"### {self.says}\n\n{self.measured}\n\n**Verdict: {self.verdict}.** ({self.rule})\n\n"
        )


def claims(folder: Path) -> list[Claim]:
    """All of them, in the paper's order."""
    by_people, five = protected(folder), first_five(targets(folder))
    found = [
        serves_the_worst_off(by_people),
        beats(five, ("CVaR, warm-up", "χ²-DRO, warm-up", "ARL")),
        lowers_the_tail_loss(by_people),
        lowers_disparities(by_people),
        keeps_up(
            five,
            "The stochastic (local) scheme does not compromise the global one",
            "IRW",
            "IRW, global reweighting",
        ),
        keeps_up(five, "The gradients of key layers are enough", "IRW, last layer", "IRW"),
    ]
    noisy = noisy_targets(folder, 0.2)
    return [*found, withstands_flips(folder)] if noisy else found


def serves_the_worst_off(found: Sequence[Target]) -> Claim:
    """IRW against plain training on the groups of people."""
    changes = {
        by: [t.difference(t.chosen("IRW", by), t.plain(), t.worst) for t in found]
        for by in (WITH, WITHOUT)
    }
    cells = "; ".join(
        f"{title(t)} {marked(a)} / {marked(b)} (oracle {marked(t.headroom())})"
        for t, a, b in zip(found, *changes.values(), strict=True)
    )
    return Claim(
        "IRW raises the accuracy of the worst-off group of people",
        "Against plain training, in points, with the setting chosen with / without group labels: "
        f"{cells}. The oracle is what training with the group labels gains: where that is nothing, "
        "there is no headroom for anybody.",
        "holds if clearly higher everywhere by either choice, in part if somewhere",
        by_count(
            [
                a.verdict == "higher" or b.verdict == "higher"
                for a, b in zip(*changes.values(), strict=True)
            ]
        ),
    )


def beats(found: Sequence[Target], others: Sequence[str]) -> Claim:
    """IRW against what else needs no groups, by headroom recovered."""
    ours = by_seed(found, "IRW", WITHOUT)
    differences = {name: estimate(ours - by_seed(found, name, WITHOUT)) for name in others}
    cells = "; ".join(f"{name}: {spread(d)}" for name, d in differences.items())
    return Claim(
        "IRW is superior to other methods that need no group labels",
        f"Where there is headroom, IRW recovers {share(float(ours.mean()))} of it on average over "
        f"the first five targets. IRW minus the other method: {cells}.",
        "holds if clearly better than each, in part if than some",
        by_count([d.verdict == "higher" for d in differences.values()]),
    )


def lowers_the_tail_loss(found: Sequence[Target]) -> Claim:
    """The objective itself, and what it costs."""
    tails, means = (
        [t.difference(t.chosen("IRW", WITHOUT), t.plain(), f"test {metric}") for t in found]
        for metric in ("tail loss", "mean loss")
    )
    cells = "; ".join(
        f"{title(t)} {number(tail)} (mean loss {number(mean)})"
        for t, tail, mean in zip(found, tails, means, strict=True)
    )
    unsure = "; ".join(f"{title(t)} {way_to_even_odds(t):.0%}" for t in found)
    return Claim(
        "The loss of the worst-off α-fraction falls",
        f"The mean of the worst tenth of the test losses, IRW minus plain: {cells}. A model that "
        "gives everybody even odds has no tail at all: of the way from plain training's mean loss "
        f"to that of even odds, ln C for C classes, IRW has gone: {unsure}.",
        "holds if clearly lower everywhere, in part if somewhere",
        by_count([tail.verdict == "lower" for tail in tails]),
    )


def way_to_even_odds(found: Target) -> float:
    """Where the mean loss of IRW is between plain training's, 0, and that of even odds, 1."""
    plain = found.plain()["test mean loss"].mean()
    ours = found.chosen("IRW", WITHOUT)["test mean loss"].mean()
    return float((ours - plain) / (np.log(TASKS[found.task].classes) - plain))


def lowers_disparities(found: Sequence[Target]) -> Claim:
    """MAD, TAD, VAR."""
    lines, verdicts = [], []
    for metric in ("MAD", "TAD", "VAR"):
        changes = [
            t.difference(t.chosen("IRW", WITHOUT), t.plain(), f"test {metric}") for t in found
        ]
        count = {v: sum(c.verdict == v for c in changes) for v in ("lower", "higher")}
        mean = float(np.mean([c.mean for c in changes]))
        change = number(Estimate(mean, float("nan"), 0)) if metric == "VAR" else points(mean)
        lines.append(
            f"{metric} clearly lower on {count['lower']} and clearly higher on {count['higher']} "
            f"of {len(found)} data sets (mean change {change})"
        )
        verdicts += [c.verdict == "lower" for c in changes]
    return Claim(
        "The disparities between groups (MAD, TAD) and the variance of the losses (VAR) fall",
        f"IRW against plain training: {'; '.join(lines)}.",
        "holds if all are clearly lower everywhere, in part if any is somewhere",
        by_count(verdicts),
    )


def keeps_up(found: Sequence[Target], says: str, ours: str, reference: str) -> Claim:
    """One form of IRW beside another that costs more or less."""
    difference = mean_change_between(found, ours, reference)
    verdict = FAILS if difference.verdict == "lower" else HOLDS
    return Claim(
        says,
        f"Worst group, {ours} minus {reference}, mean over the first five targets, in points: "
        f"{marked(difference)}.",
        "fails if clearly lower; an interval as wide as it is shows how much could be missed",
        verdict,
    )


def withstands_flips(folder: Path) -> Claim:
    """IRWO under label flips."""
    cells, verdicts = [], []
    for noise in (0.05, 0.1, 0.2):
        found = noisy_targets(folder, noise)
        over_irw = mean_change_between(found, "IRWO", "IRW")
        over_plain = mean_change(found, [t.chosen("IRWO", WITHOUT) for t in found])
        cells.append(
            f"{noise:.0%} flipped: {marked(over_irw)} against IRW, "
            f"{marked(over_plain)} against plain"
        )
        verdicts.append(over_irw.verdict == "higher")
    return Claim(
        "The outlier filter (IRWO) makes training robust",
        "Against flipped labels (for outliers in the features, see the experiments). Worst group "
        f"under flips, IRWO, in points: {'; '.join(cells)}.",
        "holds if clearly better than IRW at every share of flips, in part if at some",
        by_count(verdicts),
    )


def by_seed(found: Sequence[Target], method: str, by: str) -> np.ndarray:
    return recovered_by_seed(found, [t.chosen(method, by) for t in found])


def mean_change_between(found: Sequence[Target], one: str, other: str) -> Estimate:
    """In the worst group's accuracy, chosen without groups, mean over the targets."""
    return estimate(
        np.mean(
            [
                np.asarray(t.chosen(one, WITHOUT)[t.worst] - t.chosen(other, WITHOUT)[t.worst])
                for t in found
            ],
            axis=0,
        )
    )


def by_count(held: Sequence[bool]) -> str:
    return HOLDS if all(held) else PARTLY if any(held) else FAILS


def number(found: Estimate) -> str:
    text = f"{found.mean:+.3f}".replace("-", "−")
    return text if np.isnan(found.half) else f"{text} ± {found.half:.3f}"
