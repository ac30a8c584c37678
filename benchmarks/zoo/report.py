"""The table of the zoo, sorted by cost, and its summary."""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

Found = dict[str, Any]

EXACT = 1e-10
"""The error in float64 that a row may have."""

EXPLANATION = (
    "Time (of the processor) and peak memory: multiples of a plain step in the same run, one "
    "thread. Error: the larger one of weights and gradient against a loop of plain autograd in "
    "float64. Path: the share of the numbers in parameters that have quick products, and what the "
    "rest goes by."
)


def as_markdown(found: list[Found]) -> str:
    """Summary and table; entries that failed stand at the end with their error."""
    measured = sorted((f for f in found if "time" in f), key=lambda f: -f["time"])
    lines = [
        *_summary(measured),
        "",
        "<!-- each model, which the page folds -->",
        "",
        "| model | B | plain, ms | time | memory | error | path |",
        "|---|---:|---:|---:|---:|---:|---|",
        *map(_row, measured),
        *(
            f"| {f['name']} | | | | | | fails: {_cell(f['fails'])} |"
            for f in found
            if "time" not in f
        ),
        "",
        EXPLANATION,
    ]
    return "\n".join(lines)


def growth_as_markdown(growth: dict[str, list[Found]]) -> str:
    """Time / memory at several batch sizes, one row a model, and how far the times are apart."""
    sizes = sorted({f["size"] for found in growth.values() for f in found})
    lines = [
        "| growth with B | "
        + " | ".join(f"B = {size}" for size in sizes)
        + " | dearest / cheapest |",
        "|---|" + "---:|" * (len(sizes) + 1),
    ]
    for name, found in growth.items():
        cells = {f["size"]: f"{f['time']:.2f} / {f['memory']:.2f}" for f in found if "time" in f}
        times = [f["time"] for f in found if "time" in f]
        ratio = f"{max(times) / min(times):.2f}" if times else ""
        row = [*(cells.get(size, "fails") for size in sizes), ratio]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def summary(measured: list[Found]) -> dict[str, dict[str, Any]]:
    """Median, nine tenths and worst of the groups of models that the table speaks of."""
    groups = {
        "5 ms and more": [f for f in measured if f["milliseconds"] >= 5],
        "1 to 5 ms": [f for f in measured if 1 <= f["milliseconds"] < 5],
        "below 1 ms": [f for f in measured if f["milliseconds"] < 1],
        "BatchNorm in training": [f for f in measured if f["batch_norm"]],
        "all": measured,
    }
    return {
        name: {
            "models": len(group),
            **{what: _spread([f[what] for f in group]) for what in ("time", "memory")},
        }
        for name, group in groups.items()
        if group
    }


def _spread(values: list[float]) -> list[float]:
    nine_tenths = quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
    return [round(v, 3) for v in (median(values), nine_tenths, max(values))]


def _summary(measured: list[Found]) -> list[str]:
    lines = [
        "| models, by their plain step | number | time: median / nine tenths / worst | memory |",
        "|---|---:|---|---|",
    ]
    for name, group in summary(measured).items():
        time, memory = (" / ".join(f"{v:.2f}" for v in group[w]) for w in ("time", "memory"))
        lines.append(f"| {name} | {group['models']} | {time} | {memory} |")
    checked = [f for f in measured if "weights_error" in f]
    if checked:
        exact = sum(_error(f) <= EXACT for f in checked)
        lines += ["", f"Exact to {EXACT:g} in float64: {exact} of {len(checked)}."]
    return lines


def _error(found: Found) -> float:
    return max(found["weights_error"], found["gradient_error"])


def _row(found: Found) -> str:
    error = f"{_error(found):.0e}" if "weights_error" in found else ""
    path = found["path"] + (f"; fails: {_cell(found['fails'])}" if "fails" in found else "")
    return (
        f"| {found['name']} | {found['size']} | {found['milliseconds']:.2f} "
        f"| {found['time']:.2f} | {found['memory']:.2f} | {error} | {path} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:120]
