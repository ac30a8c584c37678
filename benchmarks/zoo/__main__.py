"""Time, peak memory and exactness of an IRW step on many architectures.

    python -m benchmarks.zoo                      # all, and the files under benchmarks/results
    python -m benchmarks.zoo --only BERT "U-Net"  # a look at some
    python -m benchmarks.zoo --growth             # the ratio at B = 16, 64, 256
    python -m benchmarks.zoo --again              # the figure of what is stored

Each model has a process of its own, with one thread; one that fails is a row with its error.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from benchmarks.report import FIGURES
from benchmarks.zoo.alone import alone, as_json
from benchmarks.zoo.entry import Entry
from benchmarks.zoo.picture import draw, stored
from benchmarks.zoo.registry import ENTRIES, GROWING, named
from benchmarks.zoo.report import as_markdown, growth_as_markdown, summary

SIZES = (16, 64, 256)
SECONDS, QUICK_SECONDS = 3.0, 0.6
LONGEST = 600
"""Seconds after which a model counts as failed."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these entries; nothing is stored"
    )
    parser.add_argument("--family", help="entries of this family; nothing is stored")
    parser.add_argument("--list", action="store_true", help="show the entries and stop")
    parser.add_argument(
        "--quick", action="store_true", help="few pairs of steps; nothing is stored"
    )
    parser.add_argument("--no-exact", action="store_true", help="without the loop in float64")
    parser.add_argument("--growth", action="store_true", help="the ratio at B = 16, 64, 256")
    parser.add_argument("--again", action="store_true", help="the figure of stored results")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    entries = _chosen(options.only, options.family)
    if options.list:
        print("\n".join(f"{e.family:24s} B = {e.size:<5d} {e.name}" for e in entries))
        return
    if options.again:
        draw(stored(options.out / "zoo.json"), FIGURES / "zoo.png")
        return
    seconds = QUICK_SECONDS if options.quick else SECONDS
    if options.growth:
        _grow(seconds, options.out, store=not options.quick)
        return
    found = measure([(entry, entry.size) for entry in entries], seconds, not options.no_exact)
    text = "\n".join([machine(), "", as_markdown(found)])
    print(text)
    if options.quick or options.only or options.family:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    measured = [f for f in found if "time" in f]
    result = {
        "machine": machine(),
        "summary": summary(measured),
        "models": list(map(rounded, found)),
    }
    _store(options.out / "zoo", text, result)
    draw(measured, FIGURES / "zoo.png")


def measure(work: Sequence[tuple[Entry, int]], seconds: float, exact: bool) -> list[dict[str, Any]]:
    """What each entry costs at its batch size, one after the other."""
    found = []
    columns = (
        *Progress.get_default_columns(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("models", total=len(work), now="")
        for entry, size in work:
            progress.update(task, now=entry.name)
            found.append(one(entry, size, seconds, exact))
            progress.console.print(_line(found[-1]), highlight=False, markup=False, soft_wrap=True)
            progress.advance(task)
    return found


def one(entry: Entry, size: int, seconds: float, exact: bool) -> dict[str, Any]:
    """Measure one entry in a fresh process."""
    arguments = [entry.name, "--size", str(size), "--seconds", str(seconds)]
    arguments += [] if exact else ["--no-exact"]
    return {"size": size} | alone(entry, "benchmarks.zoo.one", arguments, LONGEST)


def machine() -> str:
    """What it ran on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{(names or [platform.processor()])[0]}, 1 thread, torch {torch.__version__}, "
        f"Python {platform.python_version()}, alpha 0.2"
    )


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Four digits are enough."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}


def _chosen(names: list[str] | None, family: str | None) -> list[Entry]:
    try:
        entries = ENTRIES if names is None else [named(name) for name in names]
    except KeyError as error:
        raise SystemExit(error.args[0]) from None
    families = sorted({entry.family for entry in ENTRIES})
    if family is not None and family not in families:
        raise SystemExit(f"--family {family!r}: expected one of {', '.join(families)}")
    return [entry for entry in entries if family in (None, entry.family)]


def _grow(seconds: float, out: Path, store: bool) -> None:
    work = [(named(name), size) for name in GROWING for size in SIZES]
    found = measure(work, seconds, exact=False)
    growth = {name: [f for f in found if f["name"] == name] for name in GROWING}
    text = "\n".join([machine(), "", growth_as_markdown(growth)])
    print(text)
    if store:
        out.mkdir(parents=True, exist_ok=True)
        curves = {name: list(map(rounded, points)) for name, points in growth.items()}
        _store(out / "zoo_growth", text, {"machine": machine(), "growth": curves})


def _store(path: Path, text: str, result: dict[str, Any]) -> None:
    path.with_suffix(".md").write_text(text + "\n")
    path.with_suffix(".json").write_text(as_json(result) + "\n")
    print(f"written to {path}.md and .json")


def _line(found: dict[str, Any]) -> str:
    if "time" not in found:
        return f"{found['name']:40s} fails: {found['fails'][:80]}"
    return (
        f"{found['name']:40s} {found['milliseconds']:8.2f} ms  time {found['time']:6.2f}  "
        f"memory {found['memory']:5.2f}  {found['path']}"
    )


if __name__ == "__main__":
    main()
