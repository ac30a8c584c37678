"""Time and memory of one IRW step against a plain step, and against other ways to take it.

    python -m benchmarks.cost steps            # the table and the growth curves
    python -m benchmarks.cost steps --fast     # a look in a minute

Ratios of medians within one run: results/step_cost_<device>.csv and .md, and a figure.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import nn

from benchmarks import report
from benchmarks.cost.neighbours import ALPHA, METHODS, Step
from benchmarks.models import BATCHES, LENGTHS, TABLE, Work, small_mlp, transformer
from irw_optim.model_check import peak_bytes, wait

COLUMNS = ("work", "method", "milliseconds", "time", "memory", "fails")

Clock = Callable[[], float]
Makers = Mapping[str, Callable[[], Step]]
"""By method, what makes its step."""


def makers(
    work: Work,
    methods: Sequence[str],
    device: torch.device,
    changed: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Makers:
    """Steps of a piece of work, whose model may be changed first."""
    x, y = (t.to(device) for t in work.batch())
    return {m: lambda m=m: METHODS[m](changed(work.build().to(device)), x, y) for m in methods}


def in_turns(
    steps: Sequence[Callable[[], object]], clock: Clock = time.process_time, calls: int = 1
) -> Iterator[list[float]]:
    """Without end, the seconds of each step (of CPU), a mean of so many calls.

    Taken in turns, so that a slower machine slows all alike.
    """
    while True:
        seconds = []
        for step in steps:
            start = clock()
            for _ in range(calls):
                step()
            seconds.append((clock() - start) / calls)
        yield seconds


def median_seconds(
    steps: Sequence[Step], repeats: int, inner: int, device: torch.device
) -> list[float]:
    """Median time of each step, of ``repeats`` rounds of ``inner`` calls, after one."""

    def clock() -> float:
        wait(device)
        return time.perf_counter()

    rounds = islice(in_turns(steps, clock, inner), 1, repeats + 1)
    return list(map(statistics.median, zip(*rounds, strict=True)))


def ready(makers: Makers) -> tuple[dict[str, Step], dict[str, str]]:
    """By method: steps past the library's checks at uses 1, 2, 4 and 8, or why it does not run."""
    steps: dict[str, Step] = {}
    fails: dict[str, str] = {}
    for name, make in makers.items():
        try:
            step = make()
            for _ in range(9 if name.startswith("ours") else 2):
                step()
            steps[name] = step
        except Exception as error:
            fails[name] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
    return steps, fails


def measured(
    makers: Makers, device: torch.device, repeats: int, inner: int = 1, held: int = 0
) -> Iterator[tuple[Step | None, dict[str, Any]]]:
    """Each step with its time and peak memory, and as ratios to a plain one; or why it fails.

    Memory is what a step adds to the ``held`` bytes.
    """
    steps, fails = ready(makers)
    for method, reason in fails.items():
        yield None, {"method": method, "fails": reason}
    if "plain" not in steps:
        return
    seconds = median_seconds(list(steps.values()), repeats, inner, device)
    memory = [held + peak_bytes(step, device) for step in steps.values()]
    for (method, step), taken, most in zip(steps.items(), seconds, memory, strict=True):
        row = {"method": method, "ms": taken * 1e3, "time": taken / seconds[0], "MB": most / 1e6}
        yield step, row | {"memory": most / max(1, memory[0])}


def measure(
    work: Work, names: Sequence[str], device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row for each method; memory with parameters and inputs."""
    tensors = (*work.build().parameters(), work.batch()[0])
    held = sum(t.numel() * t.element_size() for t in tensors)
    made = makers(work, ("plain", *(n for n in names if n != "plain")), device)
    for _, row in measured(made, device, repeats, work.inner, held):
        yield {"work": work.name, "milliseconds": row.get("ms"), **row}


def table(
    frame: pd.DataFrame,
    keys: Sequence[str],
    methods: Sequence[str],
    text: Callable[[dict[str, Any] | None, str], str],
    note: str,
) -> str:
    """A line for each of the keys, a text for each method; below it what does not run, and why."""
    lines = []
    for names, own in frame.groupby(list(keys), sort=False):
        cells = own.set_index("method").to_dict("index")
        lines.append([*names, *(text(cells.get(method), method) for method in methods)])
    failed = frame.dropna(subset="fails")
    reasons = sorted(set(failed["method"] + ": " + failed["fails"]))
    fails = "".join(f"- does not run: {reason}\n" for reason in reasons)
    return report.table([*keys, *methods], lines) + note + fails


def as_markdown(frame: pd.DataFrame) -> str:
    """Time and memory as multiples of a plain step, one row a piece of work."""

    def text(cell: dict[str, Any] | None, method: str) -> str:
        if cell is None or pd.isna(cell["time"]):
            return "does not run"
        if method == "plain":
            return f"{cell['milliseconds']:.2f} ms"
        return f"{cell['time']:.2f} / {cell['memory']:.2f}"

    shown = [name for name in METHODS if name in set(frame["method"])]
    note = "\nTime / peak memory of tensors, as multiples of a plain step in the same run.\n"
    return table(frame, ["work"], shown, text, note)


def time_ratios(
    *actions: Callable[[], object], rounds: int, clock: Clock = time.process_time
) -> tuple[float, list[list[float]]]:
    """Median seconds (of CPU) of the first, and the others' ratios to it in every round."""
    # Past what the first call does once.
    taken = islice(in_turns(actions, clock), 1, rounds + 1)
    base, *others = zip(*taken, strict=True)
    ratios = [[other / own for other, own in zip(some, base, strict=True)] for some in others]
    return statistics.median(base), ratios


def growth(device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Milliseconds and megabytes of a step, plain and ours, as the batch or the length grows."""
    batches = [(small_mlp(size), size, repeats) for size in BATCHES]
    lengths = [(transformer(64, size, 2, 8), size, max(3, repeats // 3)) for size in LENGTHS]
    along = {"batch size, small MLP": batches, "length, small transformer": lengths}
    for name, (work, size, rounds) in ((name, one) for name, own in along.items() for one in own):
        made = makers(work, ("plain", "ours, ghost"), device)
        rows = [row for _, row in measured(made, device, rounds, work.inner)]
        print(f"{work.name:45s} {[round(row['ms'], 2) for row in rows]} ms", flush=True)
        yield from ({"along": name, "size": size, **row} for row in rows)


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
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else report.processor()
    line = f"{machine}, {chosen.threads} threads, {report.versions()}, alpha {ALPHA}"
    name, looked = f"step_cost_{device.type}", chosen.fast or chosen.only
    report.save(name, frame, looked, f"{line}\n\n{as_markdown(frame)}", machine=machine)
    if not looked:
        columns = ("along", "size", "method", "ms", "MB")
        curves = pd.DataFrame(growth(device, repeats), columns=columns)
        report.store(f"{name}_growth", curves, machine=machine)
        draw(curves, f"{name}.png")
