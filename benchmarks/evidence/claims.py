"""The paper's claims (arXiv 2411.03068), one by one, against the runs that are stored.

The claims are those of the notes that the project was designed from, in words of our own.
A verdict follows from the numbers by a rule that stands beside the claim; nothing is typed in.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.data.tasks import TASKS
from benchmarks.evidence import analysis
from benchmarks.evidence.analysis import WITH, WITHOUT, Estimate, Target, best, marked, mean_change

HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold here"


class Claim(NamedTuple):
    """The claim in our words, the numbers, when it would hold, and what follows."""

    says: str
    measured: str
    rule: str
    verdict: str

    def markdown(self) -> str:
        verdict = f"**Verdict: {self.verdict}.** ({self.rule})"
        return f"### {self.says}\n\n{self.measured}\n\n{verdict}\n\n"


def claims(folder: Path) -> list[Claim]:
    """All of them, in the paper's order."""
    people, five = analysis.protected(folder), analysis.first_five(analysis.targets(folder))
    local = "The stochastic (local) scheme does not compromise the global one"
    return [
        serves_the_worst_off(people),
        beats(five, ("CVaR, warm-up", "χ²-DRO, warm-up", "ARL")),
        lowers_the_tail_loss(people),
        lowers_disparities(people),
        keeps_up(five, local, "IRW", "IRW, global reweighting"),
        keeps_up(five, "The gradients of key layers are enough", "IRW, last layer", "IRW"),
        withstands_flips(folder),
    ]


def serves_the_worst_off(found: Sequence[Target]) -> Claim:
    changes = [
        [t.difference(t.chosen("IRW", by), t.plain(), t.worst) for by in (WITH, WITHOUT)]
        for t in found
    ]
    cells = "; ".join(
        f"{t.title} {marked(a)} / {marked(b)} (oracle {marked(t.headroom())})"
        for t, (a, b) in zip(found, changes, strict=True)
    )
    return Claim(
        "IRW raises the accuracy of the worst-off group of people",
        "Against plain training, in points, with the setting chosen with / without group labels: "
        f"{cells}. The oracle is what training with the group labels gains: where that is nothing, "
        "there is no headroom for anybody.",
        "holds if clearly higher everywhere by either choice, in part if somewhere",
        by_count([any(c.verdict == "higher" for c in either) for either in changes]),
    )


def beats(found: Sequence[Target], others: Sequence[str]) -> Claim:
    ours = analysis.mean_recovered(found, best("IRW")).mean
    differences = [analysis.mean_recovered(found, best("IRW"), less=best(m)) for m in others]
    both = zip(others, differences, strict=True)
    cells = "; ".join(f"{name}: {analysis.spread(found)}" for name, found in both)
    return Claim(
        "IRW is superior to other methods that need no group labels",
        f"Where there is headroom, IRW recovers {analysis.share(ours)} of it on average over "
        f"the first five targets. IRW minus the other method: {cells}.",
        "holds if clearly better than each, in part if than some",
        by_count([d.verdict == "higher" for d in differences]),
    )


def lowers_the_tail_loss(found: Sequence[Target]) -> Claim:
    """The objective itself, and what it costs."""
    tails, means = (against_plain(found, metric) for metric in ("tail loss", "mean loss"))
    cells = "; ".join(
        f"{t.title} {number(tail)} (mean loss {number(mean)})"
        for t, tail, mean in zip(found, tails, means, strict=True)
    )
    unsure = "; ".join(f"{t.title} {way_to_even_odds(t):.0%}" for t in found)
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
    lines, verdicts = [], []
    for metric in ("MAD", "TAD", "VAR"):
        changes = against_plain(found, metric)
        lower, higher = (sum(c.verdict == v for c in changes) for v in ("lower", "higher"))
        mean = float(np.mean([c.mean for c in changes]))
        change = number(Estimate(mean, float("nan"))) if metric == "VAR" else analysis.points(mean)
        lines.append(
            f"{metric} clearly lower on {lower} and clearly higher on {higher} "
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
    difference = mean_change(found, best(ours), other=best(reference))
    return Claim(
        says,
        f"Worst group, {ours} minus {reference}, mean over the first five targets, in points: "
        f"{marked(difference)}.",
        "fails if clearly lower; an interval as wide as it is shows how much could be missed",
        FAILS if difference.verdict == "lower" else HOLDS,
    )


def withstands_flips(folder: Path) -> Claim:
    cells, verdicts = [], []
    for noise in (0.05, 0.1, 0.2):
        found = analysis.noisy_targets(folder, noise)
        over_irw = mean_change(found, best("IRWO"), other=best("IRW"))
        over_plain = mean_change(found, best("IRWO"))
        against = f"{marked(over_irw)} against IRW, {marked(over_plain)} against plain"
        cells.append(f"{noise:.0%} flipped: {against}")
        verdicts.append(over_irw.verdict == "higher")
    return Claim(
        "The outlier filter (IRWO) makes training robust",
        "Against flipped labels (for outliers in the features, see the experiments). Worst group "
        f"under flips, IRWO, in points: {'; '.join(cells)}.",
        "holds if clearly better than IRW at every share of flips, in part if at some",
        by_count(verdicts),
    )


def against_plain(found: Sequence[Target], metric: str) -> list[Estimate]:
    """IRW, chosen without groups, minus plain training."""
    return [t.difference(t.chosen("IRW", WITHOUT), t.plain(), f"test {metric}") for t in found]


def by_count(held: Sequence[bool]) -> str:
    return HOLDS if all(held) else PARTLY if any(held) else FAILS


def number(found: Estimate) -> str:
    text = f"{found.mean:+.3f}".replace("-", "−")
    return text if np.isnan(found.half) else f"{text} ± {found.half:.3f}"
