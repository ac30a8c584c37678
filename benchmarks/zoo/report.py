"""What is found of each entry, in a process of its own; the table, its summary, and a picture."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.zoo.entry import Entry

Found = dict[str, Any]

EXACT = 1e-10
"""The error in float64 that a row may have."""

EXPLANATION = (
    "Time (of the processor) and peak memory: multiples of a plain step in the same run, one "
    "thread. Error: the larger one of weights and gradient against a loop of plain autograd in "
    "float64. Path: the share of the numbers in parameters that have quick products, and what the "
    "rest goes by.\n"
)


def alone(entry: Entry, module: str, arguments: Sequence[str], longest: int) -> Found:
    """What ``python -m module`` prints as its last line, in JSON, within ``longest`` seconds.

    One that fails is a row with its error.
    """
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    told = {"env": os.environ | threads, "capture_output": True, "text": True}
    try:
        finished = subprocess.run(command, timeout=longest, check=False, **told)
        return json.loads(finished.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    except subprocess.TimeoutExpired:
        reason = f"took more than {longest} s"
    except (IndexError, json.JSONDecodeError):
        reason = f"ended with {finished.returncode}: {finished.stderr.strip()[-200:]}"
    return {"name": entry.name, "family": entry.family, "fails": reason}


def as_json(result: dict[str, Any]) -> str:
    """One line an entry, which shows in a diff what has changed."""
    parts = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def as_markdown(found: list[Found]) -> str:
    """Summary and table; entries that failed stand at the end with their error."""
    measured = sorted(_measured(found), key=lambda f: -f["time"])
    lines = [[f["name"], *[""] * 5, f"fails: {f['fails'][:120]}"] for f in found if "time" not in f]
    head = ["model", "B", "plain, ms", "time", "memory", "error", "path"]
    texts = [True, *[False] * 5, True]
    table = report.table(head, [*map(_row, measured), *lines], texts)
    folded = "<!-- each model, which the page folds -->"
    return "\n".join([_summary(measured), folded, "", table, EXPLANATION])


def growth_as_markdown(growth: dict[str, list[Found]]) -> str:
    """Time / memory at several batch sizes, one row a model, and how far the times are apart."""
    sizes = sorted({f["size"] for found in growth.values() for f in found})
    lines = []
    for name, found in growth.items():
        cells = {f["size"]: f"{f['time']:.2f} / {f['memory']:.2f}" for f in found if "time" in f}
        times = [f["time"] for f in found if "time" in f]
        ratio = f"{max(times) / min(times):.2f}" if times else ""
        lines.append([name, *(cells.get(size, "fails") for size in sizes), ratio])
    head = ["growth with B", *(f"B = {size}" for size in sizes), "dearest / cheapest"]
    return report.table(head, lines)


def _measured(found: list[Found]) -> list[Found]:
    return [f for f in found if "time" in f]


def summary(found: list[Found]) -> dict[str, dict[str, Any]]:
    """Median, nine tenths and worst of the groups of models that the table speaks of."""
    measured = _measured(found)
    groups = {
        "5 ms and more": [f for f in measured if f["milliseconds"] >= 5],
        "1 to 5 ms": [f for f in measured if 1 <= f["milliseconds"] < 5],
        "below 1 ms": [f for f in measured if f["milliseconds"] < 1],
        "BatchNorm in training": [f for f in measured if f["batch_norm"]],
        "all": measured,
    }
    spreads = {}
    for name, group in groups.items():
        for what in ("time", "memory") if group else ():
            spread = np.quantile([f[what] for f in group], (0.5, 0.9, 1)).round(3).tolist()
            spreads.setdefault(name, {"models": len(group)})[what] = spread
    return spreads


def _summary(measured: list[Found]) -> str:
    lines = []
    for name, group in summary(measured).items():
        both = (" / ".join(f"{v:.2f}" for v in group[what]) for what in ("time", "memory"))
        lines.append([name, str(group["models"]), *both])
    head = ["models, by their plain step", "number", "time: median / nine tenths / worst", "memory"]
    table = report.table(head, lines, [True, False, True, True])
    checked = [_error(f) <= EXACT for f in measured if "weights_error" in f]
    if not checked:
        return table
    return f"{table}\nExact to {EXACT:g} in float64: {sum(checked)} of {len(checked)}.\n"


def _error(found: Found) -> float:
    return max(found["weights_error"], found["gradient_error"])


def _row(found: Found) -> list[str]:
    ratios = [f"{found[what]:.2f}" for what in ("milliseconds", "time", "memory")]
    error = f"{_error(found):.0e}" if "weights_error" in found else ""
    path = found["path"] + (f"; fails: {found['fails'][:120]}" if "fails" in found else "")
    return [found["name"], str(found["size"]), *ratios, error, path]


def draw(found: list[Found]) -> None:
    """Sorted dots of time and memory, multiples of a plain step."""
    with report.figure("zoo.png", 1, 1, (4.8, 3.3), dpi=180) as ((axes,),):
        for what, color, marker in (("time", "#0072B2", "o"), ("memory", "#D55E00", "^")):
            values = sorted(f[what] for f in found if what in f)
            share = [100 * (i + 0.5) / len(values) for i in range(len(values))]
            look = {"color": color, "markersize": 3, "alpha": 0.8}
            axes.plot(share, values, marker, label=f"{what}, median {median(values):.2f}", **look)
        axes.axhline(1, color="0.4", linewidth=1)
        look = {"ha": "right", "color": "0.3", "fontsize": 8}
        axes.annotate("a plain step", (100, 1), (0, -10), textcoords="offset points", **look)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.85)
        ticks = [t for t in (1, 1.5, 2, 3, 5, 10, 20, 50) if t <= axes.get_ylim()[1]]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        title = f"What a step costs on {len(values)} models,\nas a multiple of a plain step"
        axes.set_title(title, fontsize=9.5, fontweight="bold")
        axes.set(xlabel="share of the models, cheapest first, in %", xlim=(0, 100))
        axes.grid(axis="y", color="0.9")
