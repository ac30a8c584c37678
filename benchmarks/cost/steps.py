"""Time and memory of one IRW step against a plain step, and against other ways to take it.

    python -m benchmarks.cost steps            # the table and the growth curves
    python -m benchmarks.cost steps --fast     # a look in a minute

Ratios of medians within one run: results/step_cost_<device>.csv and .md, and a figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch

from benchmarks import report
from benchmarks.cost.neighbours import ALPHA, METHODS, Step
from benchmarks.models import BATCHES, LENGTHS, TABLE, Work, small_mlp, transformer
from irw_optim.measure import median_seconds, peak_bytes

COLUMNS = ("work", "method", "milliseconds", "time", "memory", "fails")


def measure(
    work: Work, names: Sequence[str], device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Time and peak memory of each method as ratios to a plain step; or why it does not run."""
    x, y = (t.to(device) for t in work.batch())
    steps: dict[str, Step] = {}
    for name in ("plain", *(n for n in names if n != "plain")):
        try:
            step = METHODS[name](work.build().to(device), x, y)
            for _ in range(9 if name.startswith("ours") else 1):  # past checks at 1, 2, 4, 8
                step()
            steps[name] = step
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:90]
            yield {"work": work.name, "method": name, "fails": text}
    seconds = median_seconds(list(steps.values()), repeats, work.inner)
    held = sum(t.numel() * t.element_size() for t in (*work.build().parameters(), x))
    memory = [held + peak_bytes(step) for step in steps.values()]
    for name, taken, most in zip(steps, seconds, memory, strict=True):
        row = {"work": work.name, "method": name, "milliseconds": taken * 1e3}
        yield row | {"time": taken / seconds[0], "memory": most / memory[0]}


def as_markdown(frame: pd.DataFrame) -> str:
    """Time and memory as multiples of a plain step, one row a piece of work."""
    shown = [name for name in METHODS if name in set(frame["method"]) - {"plain"}]
    lines = []
    for work, own in frame.groupby("work", sort=False):
        cells = own.set_index("method").to_dict("index")
        texts = [_text(cells[name]) for name in shown]
        lines.append([work, f"{cells['plain']['milliseconds']:.2f} ms", *texts])
    note = "\nTime / peak memory of tensors, as multiples of a plain step in the same run.\n"
    failed = frame.dropna(subset="fails")
    reasons = sorted(set(failed["method"] + ": " + failed["fails"]))
    return (
        report.table(["work", "plain", *shown], lines)
        + note
        + "".join(f"- does not run: {reason}\n" for reason in reasons)
    )


def _text(cell: dict[str, Any]) -> str:
    return "does not run" if pd.isna(cell["time"]) else f"{cell['time']:.2f} / {cell['memory']:.2f}"


def growth(device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Milliseconds and megabytes of a step, plain and ours, as the batch or the length grows."""
    batches = [(small_mlp(size), size, repeats) for size in BATCHES]
    lengths = [(transformer(64, size, 2, 8), size, max(3, repeats // 3)) for size in LENGTHS]
    for along, works in {
        "batch size, small MLP": batches,
        "length, small transformer": lengths,
    }.items():
        for work, size, rounds in works:
            x, y = (t.to(device) for t in work.batch())
            names = ("plain", "ours, ghost")
            steps = [METHODS[name](work.build().to(device), x, y) for name in names]
            for _ in range(9):
                steps[1]()
            seconds = median_seconds(steps, rounds, work.inner)
            for name, step, taken in zip(names, steps, seconds, strict=True):
                row = {"along": along, "size": size, "method": name, "ms": taken * 1e3}
                yield row | {"MB": peak_bytes(step) / 1e6}
            print(f"{work.name:45s} {[round(1e3 * taken, 2) for taken in seconds]} ms", flush=True)


def draw(frame: pd.DataFrame, name: str) -> None:
    """Growth of time and memory, on log-log axes."""
    with report.figure(name, 2, 2, (10, 6)) as axes:
        for column, (along, curves) in enumerate(frame.groupby("along", sort=False)):
            for method, own in curves.groupby("method", sort=False):
                for row, key in enumerate(("ms", "MB")):
                    axes[row, column].loglog(own["size"], own[key], "o-", label=method)
            axes[0, column].set(title=f"Growth with {along}", ylabel="ms a step")
            axes[1, column].set(xlabel=along.split(",")[0], ylabel="peak MB of tensors in a step")


def main(given: list[str]) -> None:
    chosen = report.options(
        __doc__,
        given,
        only={"default": "", "help": "rows whose name contains this"},
        methods={"default": "", "help": "names of methods, split by ;"},
        device={"default": "cpu"},
        threads={"type": int, "default": torch.get_num_threads()},
        repeats={"type": int, "default": 15},
    )
    torch.set_num_threads(chosen.threads)
    device, repeats = torch.device(chosen.device), 3 if chosen.fast else chosen.repeats
    names = [n for n in chosen.methods.split(";") if n] or list(METHODS)
    rows = []
    for work in (work for work in TABLE if chosen.only in work.name):
        rows += measure(work, names, device, repeats)
        print(work.name, flush=True)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    text = as_markdown(frame)
    print("\n" + text)
    if not chosen.fast and not chosen.only:
        about = report.header()
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else about["machine"]
        versions = f"torch {about['versions']['torch']}, Python {about['versions']['python']}"
        line = f"{machine}, {chosen.threads} threads, {versions}, alpha {ALPHA}"
        name = f"step_cost_{device.type}"
        report.store(name, frame, machine=machine)
        report.write(name, f"{line}\n\n{text}")
        curves = pd.DataFrame(growth(device, repeats))
        report.store(f"{name}_growth", curves, machine=machine)
        draw(curves, f"{name}.png")
