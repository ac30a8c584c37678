"""How the numbers of this folder's benchmarks are taken, printed and stored."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def time_ratios(
    base: Callable[[], object], *actions: Callable[[], object], rounds: int
) -> tuple[float, list[list[float]]]:
    """What actions take in units of ``base``, round by round: neighbours in time are compared.

    Returns:
        Median CPU seconds of ``base``, and for each action its ratio in every round.
    """
    for action in (base, *actions):  # past what the first call does once
        action()
    seconds = []
    ratios: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        seconds.append(_cpu_seconds(base))
        for action, own in zip(actions, ratios, strict=True):
            own.append(_cpu_seconds(action) / seconds[-1])
    return statistics.median(seconds), ratios


def _cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with the keys of all rows as columns; pairs are a number and its spread."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = {key for row in rows for key, value in row.items() if isinstance(value, str)}
    lines = [columns, ["---" if key in texts else "---:" for key in columns]]
    lines += [[_cell(key, row.get(key)) for key in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    mean, spread = value if isinstance(value, tuple) else (value, None)
    percent = key.startswith(("accuracy", "worst", "heavier", "picked"))
    precise = "variance" in key or "distance" in key
    scale, digits = (100, 1) if percent else (1, 4 if precise else 2)
    text = f"{scale * mean:.{digits}f}"
    return text if spread is None else f"{text} ± {scale * spread:.{digits}f}"


def save(
    name: str,
    table: list[dict[str, Any]],
    fast: bool,
    shown: Callable[[str], bool] = lambda column: True,
    **more: Any,
) -> None:
    """Print a table; write it to benchmarks/results as Markdown, and as JSON with all the rest.

    Args:
        name: of the two files.
        table: rows.
        fast: nothing is written.
        shown: which columns the Markdown has.
        more: goes into the JSON.
    """
    text = markdown([{k: v for k, v in row.items() if shown(k)} for row in table])
    print("\n" + text)
    if fast:
        return
    RESULTS.mkdir(exist_ok=True)
    module = Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("")
    header = {
        "command": shlex.join(["python", "-m", ".".join(module.parts), *sys.argv[1:]]),
        "machine": f"{_processor()}, {torch.get_num_threads()} thread",
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "numpy", "scikit-learn", "irw-optim")},
        },
    }
    everything = json.dumps({**header, **more, "table": table}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(everything + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
