"""The worst-off loss of IRW, CVaR and plain gradient descent against its certified optimum.

Logistic regression in float64, full batch, on 1,000 people of UCI Adult and of Law School, drawn
anew for each seed; steps rate / sqrt(t) from a random start. The rate is the best of a grid for
each method, data set and alpha, by what the method minimises, on seed 0. Law School needs
IRW_OPTIM_DATA; without it, only Adult is run.
"""

import itertools
import math
import statistics
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.data.sources import Samples, Sizes, Source, adult_and_law, split
from benchmarks.evidence.logistic import Logistic, optimum, silent_share, worst_mean
from irw_optim import irw_weights, worst_off

RIDGE, ALPHAS, RATES = 1e-3, (0.3, 0.5), (0.1, 0.3, 1.0, 3.0, 10.0)
LOOKS = {"plain": ("#999999", "--"), "CVaR": ("#0072B2", "-"), "IRW": ("#D55E00", "-")}
METHODS = tuple(LOOKS)


def alignment_constant(size: int, k: int) -> float:
    """c = 2 / (1 + sqrt(N / k)), the best constant in <d, g_S / k> >= c |g_S / k|^2."""
    return 2 / (1 + math.sqrt(size / k))


def problem_of(data: Samples) -> Logistic:
    """With a constant column, and labels of -1 and 1."""
    x = torch.cat([data.x.double(), torch.ones(len(data), 1).double()], dim=1)
    return Logistic(x, (2 * data.y - 1).double(), RIDGE)


def descend(
    problem: Logistic,
    method: str,
    alpha: float,
    rate: float,
    steps: int,
    start: Tensor,
    end: Tensor,
) -> dict[str, Any]:
    """Take the steps; what F did, and both sides of the page's inequalities with the optimum."""
    theta, at_best = start.clone(), problem.losses(end)
    values, means, closeness = [], [], []
    regret = blind = squares = total = 0.0
    for t in range(steps + 1):
        losses = problem.losses(theta)
        S = worst_off(losses, alpha).double()
        F = float(losses @ S / S.sum())
        values.append(F)
        means.append(float(losses.mean()))
        if t == steps:
            break
        G = problem.gradients(theta)
        if method == "IRW":
            w = irw_weights(losses, G, alpha)
        else:
            w = S / S.sum() if method == "CVaR" else torch.full_like(losses, 1 / len(losses))
        d, gradient = G.T @ w, G.T @ S / S.sum()
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
        "mean losses": means,
        "mean loss": means[-1],
        "least ratio": min(closeness),  # of <d, grad F> and |grad F|^2
        "steps that raise F": sum(b > a for a, b in itertools.pairwise(values)) / steps,
        "regret": regret / total,
        "bound of the regret": (float((start - end).square().sum()) + squares) / (2 * total),
        "blind": blind / total,
        "accuracy": float(right.double().mean()),
        "worst class": min(float(right[problem.y == c].double().mean()) for c in (-1, 1)),
    }


def tail(values: list[float]) -> float:
    """The mean over the last tenth of the steps: a step size that still falls makes jumps."""
    return statistics.mean(values[-max(1, len(values) // 10) :])


def study(source: Source, alpha: float, seed: int, size: int, steps: int, rates: dict[str, float]):
    """A row for each method; ``rates`` is filled where it is empty."""
    problem = problem_of(split(source, seed, Sizes(train=size))[0])
    best, centre = optimum(problem, alpha), optimum(problem, 1.0)
    generator = torch.Generator().manual_seed(seed)
    start = 0.1 * torch.randn(problem.x.shape[1], generator=generator, dtype=torch.float64)

    def go(method: str, rate: float, origin: Tensor = start, times: int = 1) -> dict[str, Any]:
        return descend(problem, method, alpha, rate, times * steps, origin, best.theta)

    for method in METHODS if not rates else ():
        goal = "mean losses" if method == "plain" else "values"
        rates[method] = min(RATES, key=lambda r, m=method, g=goal: tail(go(m, r)[g]))
    shared = {
        "F*": best.value,
        "uncertainty of F*": best.value - best.bound,
        "length of the optimum": float(best.theta.norm()),
        "F of plain's optimum": worst_mean(problem.losses(centre.theta), alpha),
        "silent share": silent_share(problem),
        "smaller class": min(float((problem.y == c).double().mean()) for c in (-1, 1)),
    }
    points = sorted({round(steps ** (i / 19)) for i in range(20)})  # evenly in log t
    for method in METHODS:
        trace = go(method, rates[method])
        values = trace.pop("values")
        trace.pop("mean losses")
        row = {"method": method, "rate": rates[method], "seed": seed, **shared, **trace}
        row |= {"gap": tail(values) - best.bound, "least gap": min(values) - best.bound}
        if method == "IRW":
            row["gap, 8 times the steps"] = tail(go("IRW", rates["IRW"], times=8)["values"])
            row["gap, 8 times the steps"] -= best.bound
            away = go("IRW", rates["IRW"], best.theta)["values"]
            row["gap from the optimum"] = tail(away) - best.value
        yield row | {f"gap after {t}": values[t] - best.bound for t in points}


def run(fast: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    size, steps, seeds = (300, 200, range(2)) if fast else (1000, 2000, range(5))
    rows = []
    for (name, source), alpha in itertools.product(adult_and_law(fast), ALPHAS):
        rates: dict[str, float] = {}
        k = int(worst_off(torch.zeros(size), alpha).sum())
        case = {"data": name, "alpha": alpha, "constant": alignment_constant(size, k)}
        for seed in seeds:
            rows += [case | row for row in study(source, alpha, seed, size, steps, rates)]
            print(name, alpha, seed, [round(row["gap"], 4) for row in rows[-3:]], flush=True)
    return rows, {"size": size, "steps": steps, "ridge": RIDGE, "rates": RATES}


LEFT = {"F − F*": ("gap", 3, 1), "least F − F*": ("least gap", 3, 1)}
LEFT |= {"mean loss": ("mean loss", 3, 1)}
LEFT |= {name: (name, 1, 100) for name in ("accuracy", "worst class")}
RIGHT = {"steps up, %": ("steps that raise F", 0, 100), "regret": ("regret", 3, 1)}
RIGHT |= {"its bound": ("bound of the regret", 3, 1), "blind": ("blind", 3, 1)}
PROBLEM = {"‖θ*‖": ("length of the optimum", 2, 1), "silent up to α": ("silent share", 2, 1)}
PROBLEM |= {"smaller class": ("smaller class", 2, 1)}


def texts(frame: pd.DataFrame) -> dict[str, str]:
    problems, methods, terms, lines = [], [], [], []
    for (data, alpha), case in frame.groupby(["data", "alpha"], sort=False):
        name, one = f"{data}, α = {alpha}", case[case["method"] == "plain"]
        unsure = f"{one['uncertainty of F*'].max():.0e}"
        problems.append([name, report.spread(one["F*"], 4), unsure, *report.cells(one, PROBLEM)])
        for method, own in case.groupby("method", sort=False):
            title, rate = f"{name}: {method}", f"{own['rate'].iloc[0]:g}"
            methods.append([title, rate, *report.cells(own, LEFT)])
            least = f"{own['least ratio'].min():.2f}"
            terms.append([title, least, *report.cells(own, RIGHT)])
        lines.append(finding(name, case, frame.attrs.get("steps", 0)))
    return {
        "convergence_problems": report.table(["", "F*", "uncertainty", *PROBLEM], problems),
        "convergence_methods": report.table(["", "rate", *LEFT], methods),
        "convergence_terms": report.table(["", "least ratio", *RIGHT], terms),
        "convergence_findings": "".join(lines) + in_all(frame),
    }


def finding(name: str, case: pd.DataFrame, steps: int) -> str:
    plain, cvar, irw = (case[case["method"] == m].set_index("seed") for m in METHODS)
    limit = plain["F of plain's optimum"] - plain["F*"]
    return (
        f"- **{name}**: after {steps:,} steps CVaR is {report.spread(cvar['gap'], 4)} above the "
        f"optimum, IRW {report.spread(irw['gap'], 4)} (paired difference "
        f"{report.paired_text(irw['gap'], cvar['gap'], 4, 1)}), and plain training "
        f"{report.spread(plain['gap'], 4)}, whose own optimum lies at {report.spread(limit, 4)}. "
        f"After {8 * steps:,} steps IRW is at {report.spread(irw['gap, 8 times the steps'], 4)}; "
        f"started at the optimum, it ends at {report.spread(irw['gap from the optimum'], 4)}.\n"
    )


def in_all(frame: pd.DataFrame) -> str:
    plain, irw = (frame[frame["method"] == m].reset_index() for m in ("plain", "IRW"))
    closed = 100 * (1 - irw["gap"] / plain["gap"])
    return (
        f"- In all {len(irw)} runs IRW ends at most {irw['gap'].max():.3f} above the optimum. Of "
        f"plain training's distance it closes {closed.median():.0f} % in the median run, "
        f"{closed.min():.0f} % in the worst one. The least ratio of the two sides of (1) without "
        f"its constant was {irw['least ratio'].min():.2f}.\n"
    )


def draw(frame: pd.DataFrame) -> None:
    """The gap along the steps: median and range over the seeds."""
    curve = [c for c in frame if c.startswith("gap after ")]
    steps = [int(c.removeprefix("gap after ")) for c in curve]
    cases = list(frame.groupby(["data", "alpha"], sort=False))
    with report.figure("convergence.png", 1, len(cases), (3.3 * len(cases), 3.4)) as (axes,):
        for axis, ((data, alpha), case) in zip(axes, cases, strict=True):
            for method, (colour, style) in LOOKS.items():
                own = case.loc[case["method"] == method, curve]
                axis.loglog(steps, own.median(), style, color=colour, label=method)
                axis.fill_between(steps, own.min(), own.max(), color=colour, alpha=0.15, lw=0)
            axis.set(title=f"{data}, α = {alpha}", xlabel="steps")
        axes[0].set_ylabel("worst-off loss − its optimum")
