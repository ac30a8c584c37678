"""IRW against IRWO under corrupted training data: whom the filter removes, and what it is worth.

    python -m benchmarks.experiments.outliers [--fast]

4,000 people of UCI Adult and of Law School, drawn anew for each seed; an MLP 64-32, Adam (1e-3),
batches of 128, 200 steps, alpha 0.3. The training part is corrupted in one of five ways:

    clean         as it is
    flips 10 %    the wrong label, for a random 10 % of the people; and 20 %
    scattered     10 % of the people have features drawn from N(0, 25), and keep their label
    a cluster     10 % have features near one point of N(0, 25), and the label 1

The filter's precision and recall count every step of the training; "removed" is its share of
a group's clean samples. The test part is never corrupted.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiments import report
from benchmarks.fairness.data import Samples, Sizes, Source, load, split
from benchmarks.fairness.evaluation import SMALLEST, evaluate
from benchmarks.fairness.files import find
from benchmarks.fairness.loop import mlp, scores, shuffled
from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.gradients.materialized import MaterializedGradients
from irw_optim.weighting.outliers import cluster_labels

ALPHA, BATCH, STEPS, EARLY = 0.3, 128, 200, 20
NAMES = {"adult": "Adult", "law_school": "Law School"}
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


def corrupted(data: Samples, how: str, seed: int) -> tuple[Samples, Tensor]:
    """The samples, and which of them are corrupted, (N,) bool; groups stay those of the truth."""
    generator = torch.Generator().manual_seed(seed)
    share = {"clean": 0.0, "flips 20 %": 0.2}.get(how, 0.1)
    chosen = torch.rand(len(data), generator=generator) < share
    x, y = data.x.clone(), data.y.clone()
    if how.startswith("flips"):
        y[chosen] = 1 - y[chosen]
    elif how.startswith("scattered"):
        x[chosen] = 5 * torch.randn(int(chosen.sum()), x.shape[1], generator=generator)
    elif how.startswith("a cluster"):
        centre = 5 * torch.randn(x.shape[1], generator=generator)
        x[chosen] = centre + 0.1 * torch.randn(int(chosen.sum()), x.shape[1], generator=generator)
        y[chosen] = 1
    return replace(data, x=x, y=y), chosen


def trained(
    data: Samples, options: dict[str, Any], steps: int, seed: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model; how often each sample was in a batch, and how often it was removed, (N,)."""
    torch.manual_seed(seed)
    model = mlp(data.x.shape[1], (64, 32), 2)
    optimizer = IRWOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-3), alpha=ALPHA, model=model, **options
    )
    seen, removed = torch.zeros(2, len(data), dtype=torch.int64)
    for _, index in zip(range(steps), shuffled(len(data), BATCH, seed), strict=False):
        optimizer.zero_grad()
        losses = F.cross_entropy(model(data.x[index]), data.y[index], reduction="none")
        optimizer.backward(losses)
        optimizer.step()
        seen[index] += 1
        removed[index] += optimizer.last_step.outliers.long()  # type: ignore[union-attr]
    optimizer.detach()
    return model, seen, removed


def removal(data: Samples, bad: Tensor, seen: Tensor, removed: Tensor) -> dict[str, Any]:
    """Precision and recall of the filter, and the share of each group's clean samples removed."""
    total = int(removed.sum())
    found: dict[str, Any] = {
        "removed": total / int(seen.sum()),
        "of clean samples": share(removed[~bad], seen[~bad]),
    }
    if bad.any():
        found["precision"] = int(removed[bad].sum()) / total if total else 0.0
        found["recall"] = share(removed[bad], seen[bad])
    for name in GROUPINGS:
        codes = data.groups[name]
        found[name] = {
            data.names[name][code]: share(removed[of], seen[of])
            for code in codes.unique().tolist()
            for of in [(codes == code) & ~bad]
            if of.sum() >= SMALLEST["test"]
        }
    return found


def share(part: Tensor, whole: Tensor) -> float:
    return int(part.sum()) / max(1, int(whole.sum()))


def clusters(model: nn.Module, data: Samples, bad: Tensor, size: int = 256) -> dict[str, float]:
    """What DBSCAN makes of corrupted samples in one batch: noise, or clusters of their own."""
    x, y, bad = data.x[:size], data.y[:size], bad[:size]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (one[None],))
        return F.cross_entropy(output, label[None])

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    gram = MaterializedGradients({parameters[name]: block for name, block in rows.items()}).gram()
    labels = cluster_labels(gram)
    own = [c for c in labels.unique() if c >= 0 and bad[labels == c].double().mean() > 0.9]
    return {
        "noise": float((labels[bad] == -1).double().mean()),
        "in clusters of their own": float(
            torch.isin(labels[bad], torch.tensor(own)).double().mean()
        )
        if own
        else 0.0,
    }


def study(source: Source, how: str, seed: int, fast: bool) -> dict[str, Any]:
    """All methods on one corrupted training part."""
    train, _, test = split(
        source, seed, Sizes(train=1000, test=4000) if fast else Sizes(train=4000)
    )
    data, bad = corrupted(train, how, seed)
    found = {}
    for name, options in METHODS.items():
        if fast and name not in ("plain", "IRW", "IRWO"):
            continue
        model, seen, removed = trained(data, options, 60 if fast else STEPS, seed)
        logits = scores(model, test.x)
        found[name] = evaluate(logits, test, "race x sex", SMALLEST["test"])
        if name in FILTERED:
            found[name]["filter"] = removal(data, bad, seen, removed)
        if name == "IRWO" and bad.any():
            early = trained(data, options, EARLY, seed)[0]
            found[name]["clusters"] = {
                "early": clusters(early, data, bad),
                "end": clusters(model, data, bad),
            }
    return found


def run(fast: bool) -> report.Result:
    names = [name for name in NAMES if find(name) is not None]
    seeds = range(2 if fast else 5)
    cases = []
    for name in names[:1] if fast else names:
        source = load(name)
        for how in CORRUPTIONS:
            runs = [study(source, how, seed, fast) for seed in seeds]
            cases.append({"data": NAMES[name], "corruption": how, "runs": runs})
            print(NAMES[name], how, flush=True)
    return {"steps": STEPS, "seeds": list(seeds), "alpha": ALPHA, "cases": cases}


EFFECTS = ("accuracy", "worst label x sex", "worst race x sex", "tail loss")


def texts(result: report.Result) -> dict[str, str]:
    effects, filters, groups, planted = [], [], [], []
    for case in result["cases"]:
        runs, where = case["runs"], f"{case['data']}, {case['corruption']}"
        methods = list(runs[0])
        for method in methods:
            row = [f"{where}: {method}"]
            for key in EFFECTS:
                scale, digits = (1, 2) if key == "tail loss" else (100, 1)
                row.append(report.spread([r[method][key] for r in runs], digits, scale))
            row.append(
                ""
                if method in ("plain", "IRW")
                else report.paired_text(
                    [r[method]["worst label x sex"] for r in runs],
                    [r["IRW"]["worst label x sex"] for r in runs],
                )
            )
            effects.append(row)
        filters += [
            [f"{where}: {m}", *filter_row([r[m] for r in runs])] for m in methods if m in FILTERED
        ]
        if case["corruption"] == "clean":
            for method in (m for m in methods if m in FILTERED):
                own = [r[method]["filter"] for r in runs]
                groups += removed_groups(f"{case['data']}: {method}", own)
        if "clusters" in runs[0]["IRWO"]:
            row = [where]
            for when in ("early", "end"):
                own = [r["IRWO"]["clusters"][when] for r in runs]
                row += [report.spread([o[key] for o in own], 0, 100) for key in own[0]]
            planted.append(row)
    return {
        "outliers_effects": report.table(["", *EFFECTS, "label x sex − IRW's"], effects),
        "outliers_filter": report.table(
            ["", "removed, %", "of clean, %", "precision", "recall"], filters
        ),
        "outliers_groups": report.table(
            ["", "everybody clean, %", "most removed", "of it, %", "least removed", "of it, %"],
            groups,
        ),
        "outliers_clusters": report.table(
            [
                "of the corrupted, %",
                f"noise, step {EARLY}",
                "own clusters",
                f"noise, step {STEPS}",
                "own clusters",
            ],
            planted,
        ),
        "outliers_findings": findings(result),
    }


def filter_row(runs: list[Any]) -> list[str]:
    own = [r["filter"] for r in runs]
    row = [
        report.spread([f["removed"] for f in own], 1, 100),
        report.spread([f["of clean samples"] for f in own], 1, 100),
    ]
    if "precision" not in own[0]:
        return [*row, "", ""]
    return [*row, *(report.spread([f[key] for f in own]) for key in ("precision", "recall"))]


def removed_groups(where: str, own: list[Any]) -> list[list[str]]:
    """Who loses most and least of its clean samples; groups that are there in every seed."""
    rows = []
    for name in GROUPINGS:
        everywhere = set.intersection(*(set(f[name]) for f in own))
        means = {g: statistics.mean(f[name][g] for f in own) for g in sorted(everywhere)}
        most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        rows.append(
            [
                f"{where}, {name}",
                report.spread([f["of clean samples"] for f in own], 1, 100),
                most,
                report.spread([f[name][most] for f in own], 1, 100),
                least,
                report.spread([f[name][least] for f in own], 1, 100),
            ]
        )
    return rows


def findings(result: report.Result) -> str:
    lines = []
    for case in result["cases"]:
        runs = case["runs"]

        def worst(method: str, runs: list[Any] = runs) -> list[float]:
            return [r[method]["worst label x sex"] for r in runs]

        line = (
            f"- **{case['data']}, {case['corruption']}**: IRW − plain "
            f"{report.paired_text(worst('IRW'), worst('plain'))} points of worst label × sex "
            f"accuracy, IRWO − IRW {report.paired_text(worst('IRWO'), worst('IRW'))}"
        )
        if "precision" in runs[0]["IRWO"]["filter"]:
            own = [r["IRWO"]["filter"] for r in runs]
            line += (
                f"; of what IRWO removes {report.spread([f['precision'] for f in own], 0, 100)} % "
                f"is corrupted, and of what is corrupted it removes "
                f"{report.spread([f['recall'] for f in own], 0, 100)} %"
            )
        lines.append(line + ".")
    return "\n".join(lines) + "\n"


def draw(result: report.Result, folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(case["data"] for case in result["cases"]))
    figure, axes = plt.subplots(
        2, len(names), figsize=(4.6 * len(names), 6), layout="constrained", squeeze=False
    )
    looks = dict(zip(METHODS, ["#999999", "#D55E00", "#0072B2", "#56B4E9", "#CC79A7"], strict=True))
    for column, name in enumerate(names):
        cases = [case for case in result["cases"] if case["data"] == name]
        for row, key in enumerate(("accuracy", "worst label x sex")):
            axis = axes[row][column]
            for offset, (method, colour) in enumerate(looks.items()):
                values = [[100 * r[method][key] for r in case["runs"]] for case in cases]
                axis.bar(
                    [i + 0.16 * (offset - 2) for i in range(len(cases))],
                    [statistics.mean(v) for v in values],
                    0.15,
                    yerr=[statistics.stdev(v) if len(v) > 1 else 0 for v in values],
                    color=colour,
                    label=method,
                    error_kw={"linewidth": 0.8},
                )
            axis.set_xticks(
                range(len(cases)),
                [
                    case["corruption"].replace(" 10 %", "\n10 %").replace(" 20 %", "\n20 %")
                    for case in cases
                ],
                fontsize=8,
            )
            axis.set_title(f"{name}: {key}, %", fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(axis="y", color="#e4e4e4")
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(folder / "outliers.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    report.main(sys.modules[__name__])
