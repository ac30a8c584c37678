"""Where all results go: a CSV file with a row a run, and the tables and figures made of it.

    results/<name>.csv     first line: the command, versions and settings, as JSON behind a "#"
    results/<table>.md     what the documentation includes

A column "± x" is the spread of the column "x": standard deviation over seeds, or what the
benchmark says. No number on a page is typed by hand, and tests compare pages with stored rows.
"""

import argparse
import io
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "irw-optim")
PERCENT = ("accuracy", "worst", "heavier")
PRECISE = ("variance", "distance")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, for readers with any colour vision."""

# The command line -----------------------------------------------------------------------------


def command(package: str, names: Sequence[str], doc: str | None) -> None:
    """``python -m <package> <name> ...`` runs the `entry` of ``<package>.<name>``."""
    chosen = arguments(doc, sys.argv[1:2], part={"choices": names}).part
    torch.set_num_threads(1)
    entry(import_module(f"{package}.{chosen}"))(sys.argv[2:])


def entry(module: Any) -> Callable[[Sequence[str]], None]:
    """Its ``main``, or what `publish` makes of its ``run(fast)``, ``texts`` and ``draw``."""
    return getattr(module, "main", None) or partial(publish, module)


def arguments(doc: str | None, given: Sequence[str] | None, **more: Any) -> argparse.Namespace:
    """An argument for each keyword, as `add_argument` takes it; a text makes a flag."""
    parser = argparse.ArgumentParser(description=str(doc).strip().split("\n")[0])
    for name, how in more.items():
        keywords = {"action": "store_true", "help": how} if isinstance(how, str) else how
        parser.add_argument(name if name == "part" else f"--{name.replace('_', '-')}", **keywords)
    return parser.parse_args(given)


def options(doc: str | None, given: Sequence[str] | None, **more: Any) -> argparse.Namespace:
    """`arguments`, and ``--fast``."""
    return arguments(doc, given, fast="a look in seconds; nothing is stored", **more)


# Storing --------------------------------------------------------------------------------------


def header(**settings: Any) -> dict[str, Any]:
    """What a reader must know to repeat it."""
    module = Path(sys.argv[0]).resolve().with_suffix("")
    parts = module.relative_to(ROOT).parts if module.is_relative_to(ROOT) else (module.name,)
    name = ".".join(parts).removesuffix(".__main__")
    return {
        "command": shlex.join(["python", "-m", name, *sys.argv[1:]]),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        **settings,
    }


def versions() -> str:
    return f"torch {version('torch')}, Python {platform.python_version()}"


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0]


def store(name: str, rows: Iterable[dict[str, Any]] | pd.DataFrame, **settings: Any) -> None:
    """Write the rows, to six digits, under their header."""
    frame = pd.DataFrame(rows)
    about = json.dumps(header(**settings), ensure_ascii=False)
    text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    (RESULTS / f"{name}.csv").write_text(f"# {about}\n{text}", encoding="utf-8")


def stored(name: str) -> pd.DataFrame:
    """The rows of the last full run; the header is in ``attrs``."""
    path = RESULTS / f"{name}.csv"
    with path.open(encoding="utf-8") as file:
        about = json.loads(file.readline().removeprefix("#"))
        frame = pd.read_csv(file)
    frame.attrs = about
    return frame


def save(name: str, rows: Any, fast: bool, text: str = "", **more: Any) -> None:
    """Print a table, of the rows unless ``text`` is given; if not ``fast``, write it, and them."""
    frame = pd.DataFrame(rows)
    text = text or markdown(frame)
    print("\n" + text)
    if not fast:
        store(name, frame, **more)
        write(name, text)


def write(name: str, text: str) -> None:
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def publish(experiment: Any, given: Sequence[str]) -> None:
    """The command line of a module with ``run(fast)``, ``texts(rows)`` and ``draw(rows)``.

    ``run`` returns rows and settings; ``--again`` makes texts and figures of what is stored.
    """
    chosen = options(experiment.__doc__, given, again="texts and figures of stored results")
    name = experiment.__name__.rpartition(".")[2]
    if chosen.again:
        frame = stored(name)
    else:
        start = time.perf_counter()
        rows, settings = experiment.run(chosen.fast)
        frame = pd.DataFrame(rows)
        if not chosen.fast:
            store(name, frame, seconds=round(time.perf_counter() - start), **settings)
            frame = stored(name)
    for stem, text in experiment.texts(frame).items():
        print(f"\n{stem}\n{text}")
        if not chosen.fast:
            write(stem, text)
    if not chosen.fast and hasattr(experiment, "draw"):
        experiment.draw(frame)


# Tables ---------------------------------------------------------------------------------------


def table(
    head: Sequence[str], lines: Iterable[Sequence[str]], texts: Sequence[bool] | None = None
) -> str:
    r"""A Markdown table; the first column is text and the others numbers, or as ``texts`` says.

    >>> print(table(["", "|g|"], [["a", "1"]]), end="")
    |  | \|g\| |
    | --- | ---: |
    | a | 1 |
    """
    rows = [[c.replace("|", r"\|").replace("\n", " ") for c in row] for row in (head, *lines)]
    texts = texts or [True, *[False] * (len(head) - 1)]
    rows.insert(1, ["---" if text else "---:" for text in texts])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def crossed(
    corner: str,
    rows: Mapping[str, Any],
    columns: Mapping[str, Callable[[Any], str]],
    *more: Sequence[str],
) -> str:
    """A table of what each column says of each row, by their names, with ``more`` lines below."""
    lines = [[name, *(text(row) for text in columns.values())] for name, row in rows.items()]
    return table([corner, *columns], [*lines, *more])


def markdown(frame: pd.DataFrame) -> str:
    """A table with the frame's columns; digits by the column's name."""
    columns = [c for c in frame if not c.startswith("± ")]
    lines = [
        [_cell(c, row[c], row.get(f"± {c}")) for c in columns] for row in frame.to_dict("records")
    ]
    texts = [not pd.api.types.is_numeric_dtype(frame[c]) for c in columns]
    return table(columns, lines, texts)


def _cell(key: str, value: Any, around: float | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str | int):
        return str(value)
    scale = 100 if key.startswith(PERCENT) else 1
    digits = 1 if scale == 100 else 4 if any(word in key for word in PRECISE) else 2
    text = f"{scale * value:.{digits}f}"
    return text if around is None else f"{text} ± {scale * around:.{digits}f}"


def spread(measured: Iterable[float | None], digits: int = 2, scale: float = 1) -> str:
    """Mean and standard deviation over seeds, as text; a dash where there is nothing to average."""
    values = list(pd.Series(measured, dtype=float).dropna())
    if not values:
        return "–"
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def cells(frame: pd.DataFrame, columns: dict[str, tuple[str, int, float]]) -> list[str]:
    """`spread` of the column under each title, with its digits and scale."""
    return [spread(frame[name], *how) for name, *how in columns.values()]


def summarised(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean and standard deviation over seeds of every number, a row for each of ``by``."""
    groups = frame.drop(columns="seed").groupby(by, sort=False)
    means, spreads = groups.mean(), groups.std().fillna(0.0).add_prefix("± ")
    return means.join(spreads).reset_index()


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean of independent values, and half the width of its 95 % t-interval; NaN for one value."""
    from scipy import stats

    size = len(values)
    half = stats.t.ppf(0.975, size - 1) * stats.sem(values) if size > 1 else math.nan
    return float(np.mean(values)), float(half)


def paired_text(
    values: Sequence[float], others: Sequence[float], digits: int = 1, scale: float = 100
) -> str:
    """The paired difference with its sign and interval; in points by default."""
    mean, half = interval(np.asarray(values, float) - np.asarray(others, float))
    text = f"{scale * mean:+.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {scale * half:.{digits}f}"


# Figures --------------------------------------------------------------------------------------


@contextmanager
def figure(
    name: str,
    rows: int,
    columns: int,
    size: tuple[float, float],
    dpi: int = 110,
    legend: int = 5,
    **more: Any,
) -> Iterator:
    """Axes, (rows, columns), of a figure that is written at the end; ``legend`` entries a line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from PIL import Image

    look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    look["axes.prop_cycle"] = mpl.cycler(color=COLOURS)
    with mpl.rc_context({"svg.hashsalt": "irw-optim", **look}):
        drawn = Figure(figsize=size, layout="constrained")
        axes = drawn.subplots(rows, columns, squeeze=False, **more)
        yield axes
        handles, labels = axes[0, -1].get_legend_handles_labels()
        if handles:
            look = {"frameon": False, "columnspacing": 1.2, "handletextpad": 0.4}
            drawn.legend(handles, labels, loc="outside lower center", ncols=legend, **look)
        if name.endswith(".svg"):
            drawn.savefig(FIGURES / name, metadata={"Date": None})
        else:  # of few colours, which takes a third of the bytes
            drawn.savefig(file := io.BytesIO(), dpi=dpi)
            Image.open(file).convert("RGB").quantize(64).save(FIGURES / name, optimize=True)


def ticks(axis: Any, places: Sequence[float], labels: Sequence[Any] | None = None) -> None:
    """These ticks, and none of the small ones of a logarithmic axis."""
    axis.set_xticks(places, [str(label) for label in labels or places])
    axis.minorticks_off()
