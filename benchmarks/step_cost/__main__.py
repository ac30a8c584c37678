"""Time and memory of one IRW step against a plain step, and against other ways to take it.

    python -m benchmarks.step_cost            # the table and the growth curves
    python -m benchmarks.step_cost --fast     # a look in a minute

Ratios of medians within one run; every method is first compared with the plain autograd loop.
Writes a Markdown table, a JSON file and a picture under --out.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.step_cost.methods import METHODS, plain
from benchmarks.step_cost.models import BATCHES, LENGTHS, TABLE, Work, small_mlp, transformer
from irw_optim.measure import median_seconds, peak_bytes

Cell = dict[str, float | str]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="few rounds, no growth curves")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--methods", default="", help="names of methods, split by ;")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    repeats = 3 if options.fast else options.repeats
    names = [n for n in options.methods.split(";") if n] or list(METHODS)
    machine = _machine(device)
    print(machine)
    table = {
        work.name: measure(work, names, device, repeats)
        for work in TABLE
        if options.only in work.name
    }
    markdown = "\n".join([machine, "", as_markdown(table, names)])
    print("\n" + as_markdown(table, names))
    if options.fast or options.only:
        return
    growth = {
        "batch size, small MLP": _grow([small_mlp(b) for b in BATCHES], BATCHES, device, repeats),
        "length, small transformer": _grow(
            [transformer(64, t, 2, 8) for t in LENGTHS], LENGTHS, device, max(3, repeats // 3)
        ),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"step_cost_{device.type}"
    (options.out / f"{name}.md").write_text(markdown + "\n")
    result = {"machine": machine, "table": table, "growth": growth}
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(growth, options.out / f"{name}.svg")
    print(f"written to {options.out}/{name}.md, .json and .svg")


def measure(
    work: Work, names: Sequence[str], device: torch.device, repeats: int
) -> dict[str, Cell]:
    """Time and peak memory of each method as ratios to a plain step; or why it does not run."""
    x, y = (t.to(device) for t in work.batch())
    cells: dict[str, Cell] = {}
    steps = {"plain": plain(work.build().to(device), x, y)}
    for name in names:
        if name == "plain":
            continue
        try:
            step = METHODS[name](work.build().to(device), x, y)
            for _ in range(9 if name.startswith("ours") else 1):  # past checks at 1, 2, 4, 8
                step()
            steps[name] = step
        except Exception as error:
            cells[name] = {"fails": f"{type(error).__name__}: {error}".splitlines()[0][:90]}
    seconds = dict(
        zip(steps, median_seconds(list(steps.values()), repeats, work.inner), strict=True)
    )
    held = _held(work.build(), x)
    memory = {name: held + peak_bytes(step) for name, step in steps.items()}
    for name in steps:
        cells[name] = {
            "milliseconds": seconds[name] * 1e3,
            "time": seconds[name] / seconds["plain"],
            "memory": memory[name] / memory["plain"],
        }
        print(f"{work.name:45s} {name:18s} {_text(cells[name])}", flush=True)
    return cells


def as_markdown(table: dict[str, dict[str, Cell]], names: Sequence[str]) -> str:
    """Time and memory as multiples of a plain step, one row a piece of work."""
    shown = [n for n in names if n != "plain"]
    lines = ["| work | plain | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for name, cells in table.items():
        row = [_text(cells[n]) if n in cells else "" for n in shown]
        lines.append(f"| {name} | {cells['plain']['milliseconds']:.2f} ms | {' | '.join(row)} |")
    lines.append("\nTime / peak memory of tensors, as multiples of a plain step in the same run.")
    failed = {
        f"{n}: {cells[n]['fails']}"
        for cells in table.values()
        for n in cells
        if "fails" in cells[n]
    }
    return "\n".join([*lines, *(f"- does not run: {reason}" for reason in sorted(failed))])


def draw(growth: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Growth of time and memory with batch size and length, on log-log axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(growth), figsize=(11, 7), layout="constrained")
    for column, (title, curves) in enumerate(growth.items()):
        for method, points in curves.items():
            size, milliseconds, megabytes = zip(*points, strict=True)
            axes[0, column].loglog(size, milliseconds, "o-", label=method)
            axes[1, column].loglog(size, megabytes, "o-", label=method)
        axes[0, column].set(title=f"Growth with {title}", ylabel="ms a step")
        axes[1, column].set(xlabel=title.split(",")[0], ylabel="peak MB of tensors in a step")
        axes[0, column].legend()
    figure.savefig(path)
    plt.close(figure)


def _grow(
    works: Sequence[Work], sizes: Sequence[int], device: torch.device, repeats: int
) -> dict[str, list[list[float]]]:
    curves: dict[str, list[list[float]]] = {"plain": [], "ours, ghost": []}
    for work, size in zip(works, sizes, strict=True):
        x, y = (t.to(device) for t in work.batch())
        steps = {n: METHODS[n](work.build().to(device), x, y) for n in curves}
        for _ in range(9):
            steps["ours, ghost"]()
        seconds = median_seconds(list(steps.values()), repeats, work.inner)
        for (name, step), taken in zip(steps.items(), seconds, strict=True):
            curves[name].append([size, taken * 1e3, peak_bytes(step) / 1e6])
        print(f"{work.name:45s} {[round(c[-1][1], 2) for c in curves.values()]} ms", flush=True)
    return curves


def _held(model: nn.Module, inputs: Tensor) -> int:
    """Bytes that training holds all the time: parameters and the batch."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), inputs))


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    cpu = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpu.exists():
        lines = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, alpha 0.2"
    )


def _text(cell: Cell) -> str:
    if "fails" in cell:
        return "does not run"
    return f"{cell['time']:.2f} / {cell['memory']:.2f}"


if __name__ == "__main__":
    main()
