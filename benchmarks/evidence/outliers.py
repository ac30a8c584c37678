"""IRW against IRWO under corrupted training data: whom the filter removes, and what it is worth.

4,000 people of UCI Adult and of Law School, drawn anew for each seed; an MLP 64-32, Adam (1e-3),
batches of 128, 200 steps, alpha 0.3. The training part is corrupted in one of five ways:

    clean         as it is
    flips 10 %    the wrong label, for a random 10 % of the people; and 20 %
    scattered     10 % of the people have features drawn from N(0, 25), and keep their label
    a cluster     10 % have features near one point of N(0, 25), and the label 1

The filter's precision and recall count every step of the training; "removed" is its share of
a group's clean samples. The test part is never corrupted.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from sklearn.cluster import DBSCAN
from torch import Tensor, nn

from benchmarks import report
from benchmarks.data.sources import Samples, Sizes, Source, adult_and_law, split
from benchmarks.evidence.evaluation import SMALLEST, evaluate
from benchmarks.methods.intrinsic import Intrinsic
from benchmarks.models import outputs_of, per_sample_gradients
from benchmarks.training import Recipe, cross_entropy, take_steps
from irw_optim import DBSCANFilter
from irw_optim.weighting.outliers import distances

STEPS, EARLY, RECIPE = 200, 20, Recipe(batch=128, lr=1e-3)
CORRUPTIONS = ("clean", "flips 10 %", "flips 20 %", "scattered 10 %", "a cluster 10 %")
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"weighting": "uniform"},
    "IRW": {},
    "IRWO": {"outliers": DBSCANFilter()},
    "IRWO, up to 20 %": {"outliers": DBSCANFilter(quantile=0.8)},
    "IRWO, eps 0.5": {"outliers": DBSCANFilter(eps=0.5)},
}
FILTERED = [name for name, options in METHODS.items() if options.get("outliers")]
GROUPINGS = ("label x sex", "label x race")
EFFECTS = {n: (n, 1, 100) for n in ("accuracy", "worst label x sex", "worst race x sex")}
EFFECTS |= {"tail loss": ("tail loss", 2, 1)}
FILTER = {"removed, %": ("removed", 1, 100), "of clean, %": ("of clean samples", 1, 100)}
FILTER |= {name: (name, 2, 1) for name in ("precision", "recall")}
NOISE, OWN = "noise, step {}", "own clusters, step {}"
_STAGES = [name.format(step) for step in (EARLY, STEPS) for name in (NOISE, OWN)]
CLUSTERS = {name: (name, 0, 100) for name in _STAGES}


def corrupted(data: Samples, how: str, seed: int) -> tuple[Samples, Tensor]:
    """The samples, and which of them are corrupted, (N,) bool; groups stay those of the truth."""
    generator = torch.Generator().manual_seed(seed)
    share = {"clean": 0.0, "flips 20 %": 0.2}.get(how, 0.1)
    chosen = torch.rand(len(data), generator=generator) < share
    x, y, number = data.x.clone(), data.y.clone(), (int(chosen.sum()), data.x.shape[1])
    if how.startswith("flips"):
        y[chosen] = 1 - y[chosen]
    elif how.startswith("scattered"):
        x[chosen] = 5 * torch.randn(*number, generator=generator)
    elif how.startswith("a cluster"):
        centre = 5 * torch.randn(x.shape[1], generator=generator)
        x[chosen] = centre + 0.1 * torch.randn(*number, generator=generator)
        y[chosen] = 1
    return replace(data, x=x, y=y), chosen


def trained(
    data: Samples, options: dict[str, Any], steps: int, seed: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model; how often each sample was in a batch, and how often it was removed, (N,)."""
    torch.manual_seed(seed)
    model = RECIPE.model(data)
    trainer = Intrinsic(0.3, 0.0, options).prepare(model, data, RECIPE, seed)
    seen, removed = torch.zeros(2, len(data), dtype=torch.int64)
    for index in take_steps(trainer, model, data, steps):
        seen[index] += 1
        removed[index] += trainer.optimizer.last_step.outliers.long()
    trainer.optimizer.detach()
    return model, seen, removed


def removal(data: Samples, bad: Tensor, seen: Tensor, removed: Tensor) -> dict[str, float]:
    """Precision and recall of the filter; of clean data the share of each group removed."""

    def share(chosen: Tensor) -> float:
        return int(removed[chosen].sum()) / max(1, int(seen[chosen].sum()))

    total = int(removed.sum())
    found = {"removed": total / int(seen.sum()), "of clean samples": share(~bad)}
    if bad.any():
        precise = int(removed[bad].sum()) / total if total else 0.0
        return found | {"precision": precise, "recall": share(bad)}
    for name in GROUPINGS:
        for code in data.groups[name].unique().tolist():
            of = data.groups[name] == code
            if of.sum() >= SMALLEST["test"]:
                found[f"{name}: {data.names[name][code]}"] = share(of)
    return found


def clusters(model: nn.Module, data: Samples, bad: Tensor, step: int) -> dict[str, float]:
    """What DBSCAN makes of corrupted samples in one batch: noise, or clusters of their own."""
    x, y, bad = data.x[:256], data.y[:256], bad[:256]
    G = per_sample_gradients(model, cross_entropy, x, y)
    D, outliers = distances(G @ G.T), DBSCANFilter()
    radius = max(float(outliers.radius(D)), 1e-30)  # scikit-learn refuses 0
    dbscan = DBSCAN(eps=radius, min_samples=outliers.min_samples, metric="precomputed")
    labels = torch.from_numpy(dbscan.fit_predict(D.numpy()))
    own = [c for c in labels.unique() if c >= 0 and bad[labels == c].double().mean() > 0.9]
    inside = torch.isin(labels[bad], torch.tensor(own)) if own else torch.zeros(1)
    found = {NOISE: labels[bad] == -1, OWN: inside}
    return {name.format(step): float(those.double().mean()) for name, those in found.items()}


def study(source: Source, how: str, seed: int, fast: bool) -> Iterator[dict[str, Any]]:
    """All methods on one corrupted training part."""
    sizes = Sizes(train=1000, test=4000) if fast else Sizes(train=4000)
    train, _, test = split(source, seed, sizes)
    data, bad = corrupted(train, how, seed)
    for name in list(METHODS)[: 3 if fast else None]:
        model, *counts = trained(data, METHODS[name], 60 if fast else STEPS, seed)
        effects = evaluate(outputs_of(model, test.x), test, None, SMALLEST["test"])
        row = {"method": name, "seed": seed, **{key: effects[key] for key in EFFECTS}}
        if name in FILTERED:
            row |= removal(data, bad, *counts)
        if name == "IRWO" and bad.any():
            early = trained(data, METHODS[name], EARLY, seed)[0]
            row |= clusters(early, data, bad, EARLY) | clusters(model, data, bad, STEPS)
        yield row


def run(fast: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for name, source in adult_and_law(fast):
        for how in CORRUPTIONS:
            case = {"data": name, "corruption": how}
            for seed in range(2 if fast else 5):
                rows += [case | row for row in study(source, how, seed, fast)]
            print(name, how, flush=True)
    return rows, {"steps": STEPS, "alpha": 0.3}


def texts(frame: pd.DataFrame) -> dict[str, str]:
    effects, filters, groups, planted, lines = [], [], [], [], []
    for (data, how), case in frame.groupby(["data", "corruption"], sort=False):
        runs = dict(list(case.groupby("method", sort=False)))
        worst = {name: own["worst label x sex"].to_numpy() for name, own in runs.items()}
        for name, own in runs.items():
            title = f"{data}, {how}: {name}"
            against = report.paired_text(worst[name], worst["IRW"]) if name in FILTERED else ""
            effects.append([title, *report.cells(own, EFFECTS), against])
            if name in FILTERED:
                row = report.cells(own, FILTER)
                filters.append([title, *(row if how != "clean" else [*row[:2], "", ""])])
            if name in FILTERED and how == "clean":
                groups += removed_groups(f"{data}: {name}", own)
        if how != "clean":
            planted.append([f"{data}, {how}", *report.cells(runs["IRWO"], CLUSTERS)])
        lines.append(finding(f"{data}, {how}", runs["IRWO"], worst))
    removed = ["", "everybody clean, %", "most removed", "of it, %", "least removed", "of it, %"]
    stages = [text for step in (EARLY, STEPS) for text in (NOISE.format(step), "own clusters")]
    return {
        "outliers_effects": report.table(["", *EFFECTS, "label x sex − IRW's"], effects),
        "outliers_filter": report.table(["", *FILTER], filters),
        "outliers_groups": report.table(removed, groups),
        "outliers_clusters": report.table(["of the corrupted, %", *stages], planted),
        "outliers_findings": "".join(lines),
    }


def removed_groups(where: str, own: pd.DataFrame) -> list[list[str]]:
    """Who loses most and least of its clean samples; groups that are there in every seed."""
    rows = []
    for name in GROUPINGS:
        groups = own[sorted(c for c in own if c.startswith(f"{name}: "))].dropna(axis=1)
        means, row = groups.mean(), report.cells(own, {"": ("of clean samples", 1, 100)})
        for group in (means.idxmax(), means.idxmin()):
            row += [group.removeprefix(f"{name}: "), report.spread(groups[group], 1, 100)]
        rows.append([f"{where}, {name}", *row])
    return rows


def finding(where: str, irwo: pd.DataFrame, worst: dict[str, Any]) -> str:
    line = (
        f"- **{where}**: IRW − plain {report.paired_text(worst['IRW'], worst['plain'])} points of "
        f"worst label × sex accuracy, IRWO − IRW {report.paired_text(worst['IRWO'], worst['IRW'])}"
    )
    if irwo["precision"].notna().any():
        line += (
            f"; of what IRWO removes {report.spread(irwo['precision'], 0, 100)} % is corrupted, "
            f"and of what is corrupted it removes {report.spread(irwo['recall'], 0, 100)} %"
        )
    return line + ".\n"


def draw(frame: pd.DataFrame) -> None:
    names = frame["data"].unique()
    colours = ["#999999", "#D55E00", "#0072B2", "#56B4E9", "#CC79A7"]
    with report.figure("outliers.png", 2, len(names), (4.6 * len(names), 6)) as axes:
        for column, name in enumerate(names):
            own = frame[frame["data"] == name].groupby(["corruption", "method"], sort=False)
            for axis, key in zip(axes[:, column], ("accuracy", "worst label x sex"), strict=True):
                means, spreads = (100 * own[key].mean(), 100 * own[key].std())
                labels = [
                    how.replace(" 10 %", "\n10 %").replace(" 20 %", "\n20 %") for how in CORRUPTIONS
                ]
                for i, (method, colour) in enumerate(zip(METHODS, colours, strict=True)):
                    where = [j + 0.16 * (i - 2) for j in range(len(CORRUPTIONS))]
                    heights, errors = (v.xs(method, level="method") for v in (means, spreads))
                    axis.bar(where, heights, 0.15, yerr=errors, color=colour, label=method)
                report.ticks(axis, range(len(labels)), labels)
                axis.set(title=f"{name}: {key}, %")
