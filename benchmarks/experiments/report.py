"""Where the experiments' results go: one JSON file each, and the Markdown that the pages include.

An experiment is a module with three functions, and `main` here runs them::

    run(fast) -> dict               what was measured, plain numbers only
    texts(result) -> {name: text}   tables and sentences, made of the result and nothing else
    draw(result, folder)            figures (where there are any)

so that no number on a page was typed by hand, and a test can compare the pages' files with the
stored results.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy
import torch
from scipy import stats

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
FIGURES = ROOT / "docs" / "figures"

Result = dict[str, Any]


def main(experiment: ModuleType) -> None:
    """The command line of an experiment."""
    assert experiment.__doc__ is not None
    parser = argparse.ArgumentParser(description=experiment.__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a look in seconds; nothing is written")
    parser.add_argument("--again", action="store_true", help="texts and figures of stored results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = experiment.__spec__.name.rpartition(".")[2] if experiment.__spec__ else ""
    if options.again:
        result = stored(name)
    else:
        start = time.perf_counter()
        result = experiment.run(options.fast)
        result = {**header(experiment), "seconds": round(time.perf_counter() - start), **result}
    result = rounded(result)
    for stem, text in experiment.texts(result).items():
        print(f"\n{stem}\n{text}")
    if options.fast:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not options.again:
        (RESULTS / f"{name}.json").write_text(as_json(result), encoding="utf-8")
    for stem, text in experiment.texts(result).items():
        (RESULTS / f"{stem}.md").write_text(text, encoding="utf-8")
    if hasattr(experiment, "draw"):
        FIGURES.mkdir(parents=True, exist_ok=True)
        experiment.draw(result, FIGURES)


def as_json(result: Result) -> str:
    """JSON with a line for each key, and for each element of a list: small, and fit for a diff.

    >>> print(as_json({"steps": 2, "runs": [{"a": 1.5}, {"a": 2}]}), end="")
    {
    "steps": 2,
    "runs": [
    {"a": 1.5},
    {"a": 2}
    ]
    }
    """

    def dumps(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = []
    for key, value in result.items():
        rows = ",\n".join(map(dumps, value)) if isinstance(value, list) else None
        lines.append(f"{dumps(key)}: " + (dumps(value) if rows is None else f"[\n{rows}\n]"))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def stored(name: str) -> Result:
    """The result of the last full run of an experiment."""
    result: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def header(experiment: ModuleType) -> Result:
    name = experiment.__spec__.name if experiment.__spec__ else experiment.__name__
    return {
        "command": shlex.join(["python", "-m", name, *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "threads": torch.get_num_threads(),
    }


def rounded(value: Any) -> Any:
    """Floats to six digits; None for a mean over nobody."""
    if isinstance(value, dict):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


def spread(measured: Sequence[float | None], digits: int = 2, scale: float = 1) -> str:
    """Mean and standard deviation over seeds, as text; a dash where there is nothing to average."""
    values = [value for value in measured if value is not None]
    if not values:
        return "–"
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences over seeds, and half the width of its 95 % t-interval."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * error


def paired_text(
    values: Sequence[float], others: Sequence[float], digits: int = 1, scale: float = 100
) -> str:
    """The paired difference with its sign and interval; in points by default."""
    mean, half = paired(values, others)
    text = f"{scale * mean:+.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {scale * half:.{digits}f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers.

    >>> print(table(["", "|g|"], [["a", "1"]]), end="")
    |  | \\|g\\| |
    | --- | ---: |
    | a | 1 |
    """
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (columns, *rows)]
    lines = [cells[0], ["---", *["---:"] * (len(columns) - 1)], *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
