"""Runs the grid and keeps each run's numbers: stopped at any time, it goes on where it was.

    python -m benchmarks.fairness.sweep [--slow | --search] [--tasks adult ...] [--seeds 0 ...]

Seed by seed, so that a coarse table exists early. One row a run in <results>/<task>.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy
import sklearn
import torch
from torch import Tensor

import irw_optim
from benchmarks.fairness.evaluation import SMALLEST, clusters, evaluate, score_without_groups
from benchmarks.fairness.grid import NOISY, PLAIN, Setting, searched, settings_of, slowly
from benchmarks.fairness.loop import SLOW, Recipe, scores, train
from benchmarks.fairness.methods.stages import moved
from benchmarks.fairness.tasks import TASKS, Parts, Task

RESULTS = Path(__file__).parents[1] / "results" / "fairness"
RESULTS_SLOW = RESULTS.with_name("fairness_slow")
RESULTS_SEARCH = RESULTS.with_name("fairness_search")
KEY = ("noise", "seed", "setting")
NOISES = (0.0, 0.05, 0.1, 0.2)
KEPT_OF_VALIDATION = ("accuracy", "worst ", "tail loss")


@dataclass(frozen=True)
class Bench:
    """One task with one seed: its data, and what all settings share."""

    task: Task
    seed: int
    noise: float
    recipe: Recipe

    def rows(self, settings: Iterable[Setting]) -> Iterator[dict[str, object]]:
        """A row for each setting; settings that only decide differently share a training."""
        parts = self.task.parts(self.seed, self.noise)
        cluster = clusters(parts[1])
        trained_on: dict[str, Tensor] = {}
        for setting in settings:
            started = time.process_time()
            kind = PLAIN if setting.moved else setting.name
            if kind not in trained_on:
                model = train(parts[0], setting.how, self.recipe, self.seed)
                trained_on[kind] = scores(model, torch.cat([parts[1].x, parts[2].x]))
            seconds = time.process_time() - started
            logits = moved(trained_on[kind], parts[0].y, setting.moved)
            yield {
                "noise": self.noise,
                "seed": self.seed,
                "method": setting.method,
                "setting": setting.name,
                "told": setting.told,
                "seconds": round(seconds, 2),
                **self.numbers(logits, parts, cluster),
            }

    def numbers(self, logits: Tensor, parts: Parts, cluster: np.ndarray) -> dict[str, float]:
        """What is known of a model: on validation, to choose by, and on test."""
        said = dict(
            zip(("validation", "test"), logits.split([len(p) for p in parts[1:]]), strict=True)
        )
        row = {"score without groups": score_without_groups(said["validation"], parts[1], cluster)}
        for part, data in zip(said, parts[1:], strict=True):
            found = evaluate(said[part], data, self.task.protected, SMALLEST[part])
            row |= {
                f"{part} {name}": value
                for name, value in found.items()
                if part == "test" or name.startswith(KEPT_OF_VALIDATION)
            }
        return {name: round(value, 4) for name, value in row.items()}


def sweep(
    tasks: Iterable[Task],
    seeds: Iterable[int],
    noises: Iterable[float],
    folder: Path,
    recipe: Recipe,
    settings: Callable[[Task, float], Iterable[Setting]],
) -> None:
    """Run what is not in the folder's tables yet: of each task, at each noise, these settings."""
    tasks, noises = list(tasks), list(noises)
    folder.mkdir(parents=True, exist_ok=True)
    note_how(folder, recipe)
    for seed in seeds:
        for noise in noises:
            for task in tasks:
                path = folder / f"{task.name}.csv"
                done = finished(path)
                missing = [
                    setting
                    for setting in settings(task, noise)
                    if (f"{noise:g}", str(seed), setting.name) not in done
                ]
                if missing:
                    print(f"seed {seed}, noise {noise:g}, {task.name}: {len(missing)}", flush=True)
                    for row in Bench(task, seed, noise, recipe).rows(missing):
                        append(path, row)


def finished(path: Path) -> set[tuple[str, ...]]:
    """The keys of the rows that a table has."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return {tuple(row[column] for column in KEY) for row in csv.DictReader(file)}


def append(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    row = {**row, "noise": f"{row['noise']:g}"}
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def note_how(folder: Path, recipe: Recipe) -> None:
    """What a reader must know to repeat it, beside the tables."""
    versions = {
        "python": platform.python_version(),
        "irw-optim": irw_optim.__version__,
        **{package.__name__: package.__version__ for package in (torch, np, sklearn, scipy)},
    }
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.fairness.sweep", *sys.argv[1:]]),
        "recipe": {"optimizer": "Adam, cosine decay to 0", **asdict(recipe)},
        "versions": versions,
        "threads": torch.get_num_threads(),
    }
    (folder / "how.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, help="0 to 4; with --search 100 to 102")
    parser.add_argument("--noise", nargs="+", type=float, default=NOISES)
    parser.add_argument("--slow", action="store_true", help="the slow recipe, fewer methods")
    parser.add_argument("--search", action="store_true", help="for one setting for all data sets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.tasks:
        if not TASKS[name].available:
            print(f"{name}: no data, left out (IRW_OPTIM_DATA)")
    tasks = [TASKS[name] for name in options.tasks if TASKS[name].available]
    seeds = options.seeds or (range(100, 103) if options.search else range(5))
    if options.slow:
        sweep(tasks, seeds, [0.0], RESULTS_SLOW, SLOW, slowly)
    elif options.search:
        sweep(tasks, seeds, [0.0], RESULTS_SEARCH, Recipe(), searched)
        noisy = [task for task in tasks if task.name in NOISY]
        sweep(noisy, seeds, [0.1, 0.2], RESULTS_SEARCH, Recipe(), searched)
    else:
        sweep(tasks, seeds, options.noise, RESULTS, Recipe(), settings_of)


if __name__ == "__main__":
    main()
