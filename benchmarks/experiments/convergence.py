"""The worst-off loss of IRW, CVaR and plain gradient descent against its certified optimum.

    python -m benchmarks.experiments.convergence [--fast]

Logistic regression in float64, full batch, on 1,000 people of UCI Adult and of Law School, drawn
anew for each seed; steps rate / sqrt(t) from a random start. The rate is the best of a grid for
each method, data set and alpha, by what the method minimises, on seed 0. Law School needs
IRW_OPTIM_DATA; without it, only Adult is run.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments import report
from benchmarks.experiments.guarantees import alignment_constant
from benchmarks.experiments.logistic import Logistic, optimum, silent_share, worst_mean
from benchmarks.fairness.data import Samples, Sizes, Source, load, split
from benchmarks.fairness.files import find
from irw_optim import irw_weights, worst_off

RIDGE = 1e-3
ALPHAS = (0.3, 0.5)
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
METHODS = ("plain", "CVaR", "IRW")
NAMES = {"adult": "Adult", "law_school": "Law School"}


def problem_of(data: Samples) -> Logistic:
    """With a constant column, and labels of -1 and 1."""
    x = torch.cat([data.x.double(), torch.ones(len(data), 1).double()], dim=1)
    return Logistic(x, (2 * data.y - 1).double(), RIDGE)


def descend(
    problem: Logistic,
    method: str,
    alpha: float,
    *,
    rate: float,
    steps: int,
    start: Tensor,
    best: Tensor,
) -> dict[str, Any]:
    """Take the steps; what F did, and both sides of the page's inequalities."""
    theta = start.clone()
    at_best = problem.losses(best)
    values, means, closeness = [], [], []
    regret = blind = squares = total = 0.0
    for t in range(steps + 1):
        losses, rows = problem.losses(theta), problem.rows(theta)
        S = worst_off(losses, alpha).double()
        k = float(S.sum())
        F = float(losses @ S) / k
        values.append(F)
        means.append(float(losses.mean()))
        if t == steps:
            break
        w = {
            "plain": lambda losses=losses: torch.full_like(losses, 1 / len(losses)),
            "CVaR": lambda S=S, k=k: S / k,
            "IRW": lambda losses=losses, rows=rows: irw_weights(losses, rows, alpha),
        }[method]()
        d = rows.combine(w)[theta]
        gradient = rows.combine(S / k)[theta]
        closeness.append(float(d @ gradient) / float(gradient.square().sum()))
        eta = rate / math.sqrt(t + 1)
        here, there = float(w @ losses), float(w @ at_best)
        regret += eta * (here - there)
        blind += eta * ((F - here) - (worst_mean(at_best, alpha) - there))
        squares += eta**2 * float(d.square().sum())
        total += eta
        theta = theta - eta * d
    right = (problem.x @ theta) * problem.y > 0
    return {
        "values": values,
        "mean loss": means[-1],
        "mean losses": means,
        "least <d, grad F> / |grad F|^2": min(closeness),
        "steps that raise F": sum(b > a for a, b in itertools.pairwise(values)) / steps,
        "regret": regret / total,
        "bound of the regret": (float((start - best).square().sum()) + squares) / (2 * total),
        "blind": blind / total,
        "accuracy": float(right.double().mean()),
        "worst class": min(float(right[problem.y == c].double().mean()) for c in (-1, 1)),
    }


def tail(values: list[float]) -> float:
    """The mean over the last tenth of the steps: a step size that still falls makes jumps."""
    last = values[-max(1, len(values) // 10) :]
    return statistics.mean(last)


def study(source: Source, alpha: float, seeds: range, size: int, steps: int) -> dict[str, Any]:
    """All methods on one data set at one alpha."""
    chosen: dict[str, float] = {}
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        problem = problem_of(split(source, seed, Sizes(train=size))[0])
        found, centre = optimum(problem, alpha), optimum(problem, 1.0)
        generator = torch.Generator().manual_seed(seed)
        start = 0.1 * torch.randn(problem.x.shape[1], generator=generator, dtype=torch.float64)
        setup: dict[str, Any] = {"steps": steps, "best": found.theta}
        if not chosen:
            for method in METHODS:
                goal = "mean losses" if method == "plain" else "values"
                chosen[method] = min(
                    RATES,
                    key=lambda rate, method=method, goal=goal: tail(
                        descend(problem, method, alpha, rate=rate, start=start, **setup)[goal]
                    ),
                )
        row: dict[str, Any] = {
            "seed": seed,
            "F*": found.value,
            "uncertainty of F*": found.value - found.bound,
            "length of the optimum": float(found.theta.norm()),
            "F of plain's optimum": worst_mean(problem.losses(centre.theta), alpha),
            "silent share": silent_share(problem),
            "smaller class": min(float((problem.y == c).double().mean()) for c in (-1, 1)),
            "methods": {},
        }
        for method in METHODS:
            trace = descend(problem, method, alpha, rate=chosen[method], start=start, **setup)
            row["methods"][method] = summary(trace, found.bound)
        away = descend(problem, "IRW", alpha, rate=chosen["IRW"], start=found.theta, **setup)
        longer = descend(
            problem, "IRW", alpha, rate=chosen["IRW"], start=start, **{**setup, "steps": 8 * steps}
        )
        row["IRW, 8 times the steps"] = tail(longer["values"]) - found.bound
        row["IRW from the optimum"] = tail(away["values"]) - found.value
        runs.append(row)
        gaps = {m: round(row["methods"][m]["gap"], 4) for m in METHODS}
        print(f"alpha {alpha}, seed {seed}: F* {found.value:.4f}, {gaps}", flush=True)
    constant = alignment_constant(size, int(worst_off(torch.zeros(size), alpha).sum()))
    return {"alpha": alpha, "rates": chosen, "constant": constant, "runs": runs}


def summary(trace: dict[str, Any], bound: float) -> dict[str, Any]:
    """What is stored of a run: the gap to the proven bound, at forty steps evenly in log t."""
    values = trace.pop("values")
    trace.pop("mean losses")
    steps = len(values) - 1
    shown = sorted({round(steps ** (i / 39)) for i in range(40)})
    return {
        "gap": tail(values) - bound,
        "least gap": min(values) - bound,
        "curve": [[t, values[t] - bound] for t in shown],
        **trace,
    }


def run(fast: bool) -> report.Result:
    names = [name for name in NAMES if find(name) is not None]
    size, steps, seeds = (300, 200, range(2)) if fast else (1000, 2000, range(5))
    studies = []
    for name in names[:1] if fast else names:
        source = load(name)
        studies += [
            {"data": NAMES[name], **study(source, alpha, seeds, size, steps)} for alpha in ALPHAS
        ]
    return {"size": size, "steps": steps, "ridge": RIDGE, "rates": RATES, "studies": studies}


def texts(result: report.Result) -> dict[str, str]:
    problems, methods = [], []
    for case in result["studies"]:
        runs, name = case["runs"], f"{case['data']}, α = {case['alpha']}"
        problems.append(
            [
                name,
                report.spread([r["F*"] for r in runs], 4),
                f"{max(r['uncertainty of F*'] for r in runs):.0e}",
                report.spread([r["length of the optimum"] for r in runs]),
                report.spread([r["silent share"] for r in runs]),
                report.spread([r["smaller class"] for r in runs]),
            ]
        )
        for method in METHODS:
            of = [r["methods"][method] for r in runs]
            methods.append(
                [
                    f"{name}: {method}",
                    f"{case['rates'][method]:g}",
                    report.spread([r["gap"] for r in of], 3),
                    report.spread([r["least gap"] for r in of], 3),
                    report.spread([r["mean loss"] for r in of], 3),
                    report.spread([r["accuracy"] for r in of], 1, 100),
                    report.spread([r["worst class"] for r in of], 1, 100),
                    f"{min(r['least <d, grad F> / |grad F|^2'] for r in of):.2f}",
                    report.spread([r["steps that raise F"] for r in of], 0, 100),
                    report.spread([r["regret"] for r in of], 3),
                    report.spread([r["bound of the regret"] for r in of], 3),
                    report.spread([r["blind"] for r in of], 3),
                ]
            )
    left = ["", "rate", "F − F*", "least F − F*", "mean loss", "accuracy", "worst class"]
    right = ["", "least ratio", "steps up, %", "regret", "its bound", "blind"]
    return {
        "convergence_problems": report.table(
            ["", "F*", "uncertainty", "‖θ*‖", "silent up to α", "smaller class"], problems
        ),
        "convergence_methods": report.table(left, [row[:7] for row in methods]),
        "convergence_terms": report.table(right, [[row[0], *row[7:]] for row in methods]),
        "convergence_findings": findings(result),
    }


def findings(result: report.Result) -> str:
    lines = []
    for case in result["studies"]:
        runs = case["runs"]

        def gap(method: str, runs: list[Any] = runs) -> list[float]:
            return [r["methods"][method]["gap"] for r in runs]

        limit = [r["F of plain's optimum"] - r["F*"] for r in runs]
        away = [r["IRW from the optimum"] for r in runs]
        longer = [r["IRW, 8 times the steps"] for r in runs]
        lines.append(
            f"- **{case['data']}, α = {case['alpha']}**: after {result['steps']:,} steps CVaR is "
            f"{report.spread(gap('CVaR'), 4)} above the optimum, IRW "
            f"{report.spread(gap('IRW'), 4)} (paired difference "
            f"{report.paired_text(gap('IRW'), gap('CVaR'), 4, 1)}), and plain "
            f"training {report.spread(gap('plain'), 4)}, whose own optimum lies at "
            f"{report.spread(limit, 4)}. After {8 * result['steps']:,} steps IRW is at "
            f"{report.spread(longer, 4)}; started at the optimum, it ends at "
            f"{report.spread(away, 4)}."
        )
    pairs = [
        (run["methods"]["IRW"], run["methods"]["plain"])
        for case in result["studies"]
        for run in case["runs"]
    ]
    closed = [100 * (1 - irw["gap"] / plain["gap"]) for irw, plain in pairs]
    lines.append(
        f"- In all {len(pairs)} runs IRW ends at most {max(irw['gap'] for irw, _ in pairs):.3f} "
        f"above the optimum. Of plain training's distance it closes "
        f"{statistics.median(closed):.0f} % in the median run, {min(closed):.0f} % in the worst "
        f"one. The least ratio of the two sides of (1) without its constant was "
        f"{min(irw['least <d, grad F> / |grad F|^2'] for irw, _ in pairs):.2f}."
    )
    return "\n".join(lines) + "\n"


def draw(result: report.Result, folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = result["studies"]
    looks = {"plain": ("#999999", "--"), "CVaR": ("#0072B2", "-"), "IRW": ("#D55E00", "-")}
    figure, axes = plt.subplots(
        1, len(cases), figsize=(3.3 * len(cases), 3.4), layout="constrained", squeeze=False
    )
    for axis, case in zip(axes[0], cases, strict=True):
        for method, (colour, style) in looks.items():
            curves = [r["methods"][method]["curve"] for r in case["runs"]]
            steps = [t for t, _ in curves[0]]
            gaps = [[gap for _, gap in curve] for curve in curves]
            columns = list(zip(*gaps, strict=True))
            middle = [statistics.median(c) for c in columns]
            axis.loglog(steps, middle, style, color=colour, label=method)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(f"{case['data']}, α = {case['alpha']}", fontsize=10)
        axis.set_xlabel("steps")
        axis.grid(which="major", color="#e4e4e4")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("worst-off loss − its optimum")
    axes[0][-1].legend(frameon=False)
    figure.savefig(folder / "convergence.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    report.main(sys.modules[__name__])
