"""What can be seen without groups, and how often it is right about the groups."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from benchmarks.evidence.analysis import Pick, Target, best_of_each_seed, estimate, marked, spread
from benchmarks.evidence.grid import PLAIN
from benchmarks.report import table

NONE = ["–", "–"]
GAP, THIRD, GAINED = 0.2, 1 / 3, 0.02
Sign = Callable[[pd.DataFrame, pd.DataFrame], "pd.Series[bool]"]
"""From the runs of a remedy and of class balancing, one a seed, to who shows it."""

SIGNS: dict[str, Sign] = {
    "rare class: 20 points more accurate in training than on held-out samples": (
        lambda ours, other: ours["training rare class"] - ours["test rare class"] > GAP
    ),
    "effective sample size of the held weights below a third": lambda ours, other: (
        ours["held"].astype(float) < THIRD
    ),
    "validation accuracy falls more than balancing's": lambda ours, other: (
        ours["validation accuracy"] < other["validation accuracy"]
    ),
}


def hurts(found: Sequence[Target], ours: str, other: str) -> str:
    """Worst group against class balancing where a sign is seen, and where it is not."""
    rows = []
    for t in found:
        one, two = t.setting(ours), t.setting(other)
        shown = {name: sign(one, two) for name, sign in SIGNS.items()}
        rows.append(pd.DataFrame({"change": one[t.worst] - two[t.worst], **shown}))
    runs = pd.concat(rows)
    runs["any of them"] = runs[list(SIGNS)].any(axis=1)
    lines = []
    for name in (*SIGNS, "any of them"):
        cells = [name, f"{runs[name].mean():.0%}"]
        for seen in (True, False):
            own = runs.loc[runs[name] == seen, "change"]
            by_seed = own.groupby(level="seed").mean()
            cells += [marked(estimate(by_seed)), f"{(own < 0).mean():.0%}"] if len(own) else NONE
        lines.append(cells)
    head = ["sign", "of the runs", "seen: points against balancing", "worse"]
    return table([*head, "not seen: points", "worse"], lines)


def choice(found: Sequence[Target], remedies: Mapping[str, str]) -> str:
    """Does the score without groups rank the remedies, and what does a choice by it recover?"""
    lines = []
    for t in found:
        runs = t.runs[t.runs["setting"].isin([PLAIN, *remedies.values()])]
        ranks = [
            spearmanr(own[t.worst], own[["score without groups", "validation accuracy"]]).statistic
            for _, own in runs.groupby("seed")
        ]
        cells = [spread(estimate([rank[0, place] for rank in ranks])) for place in (1, 2)]
        lines.append([t.title, *cells, spread(t.recovered(by_score(remedies.values())(t)))])
    head = ["", "rank correlation: score", "validation accuracy"]
    return table([*head, "headroom recovered by the choice"], lines)


def by_score(settings: Iterable[str]) -> Pick:
    """For each seed the run that the score without groups prefers, plain training among them."""
    names = [PLAIN, *settings]

    def pick(found: Target) -> pd.DataFrame:
        runs = found.runs[found.runs["setting"].isin(names)]
        return best_of_each_seed(runs, "score without groups")

    return pick


def within_noise(found: Sequence[Target], remedies: Mapping[str, str]) -> str:
    """Is a gain in the worst label x cluster cell right about the worst group?"""
    lines = []
    for kind, of in (("one run, binomial", by_run), ("all seeds, t interval", by_target)):
        said = pd.concat([of(t, setting) for t in found for setting in remedies.values()])
        for verdict in VERDICTS.values():
            own = said.loc[said["said"] == verdict, "change"]
            really = [own > GAINED, own.abs() <= GAINED, own < -GAINED]
            cells = [f"{r.mean():.0%}" if len(own) else "–" for r in really]
            lines.append([f"{kind}: {verdict}", f"{len(own) / len(said):.0%}", *cells])
    head = ["worst label × cluster cell", "said of", "worst group gained", "stayed", "lost"]
    return table(head, lines)


VERDICTS = {0: "within noise", 1: "a gain", -1: "a loss"}


def by_run(found: Target, setting: str) -> pd.DataFrame:
    """What the two accuracies say of each run, by their binomial errors."""
    ours, plain = found.setting(setting), found.plain()
    variance = sum(r["cell"] * (1 - r["cell"]) / r["cell size"] for r in (ours, plain))
    difference = ours["cell"] - plain["cell"]
    sign = np.sign(difference).where(difference.abs() > 1.96 * np.sqrt(variance), 0)
    change = ours[found.worst] - plain[found.worst]
    return pd.DataFrame({"said": sign.map(VERDICTS), "change": change})


def by_target(found: Target, setting: str) -> pd.DataFrame:
    """What the seeds together say."""
    ours, plain = found.setting(setting), found.plain()
    verdict = estimate(ours["cell"] - plain["cell"]).verdict
    said = VERDICTS[{"higher": 1, "lower": -1}.get(verdict, 0)]
    return pd.DataFrame({"said": [said], "change": (ours[found.worst] - plain[found.worst]).mean()})
