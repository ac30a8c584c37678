"""Does it help the worst-off? Runs the grid and keeps each run: stopped at any time, it goes on.

    python -m benchmarks.evidence sweep [--slow | --search] [--tasks adult ...] [--seeds 0 ...]

Seed by seed, so that a coarse table exists early. One row a run in <results>/<task>.csv.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.data.tasks import TASKS, Task
from benchmarks.evidence.evaluation import Trained, clusters, everything
from benchmarks.evidence.grid import NOISY, PLAIN, Setting, searched, settings_of, slowly
from benchmarks.methods.stages import moved
from benchmarks.models import outputs_of
from benchmarks.training import SLOW, Recipe, Trainer, train

RESULTS, RESULTS_SLOW, RESULTS_SEARCH = (
    report.RESULTS / name for name in ("fairness", "fairness_slow", "fairness_search")
)
KEY = ("noise", "seed", "setting")
NOISES = (0.0, 0.05, 0.1, 0.2)
Row = dict[str, object]
Measure = Callable[[Trained], dict[str, float]]


def rows_of(
    task: Task,
    seed: int,
    noise: float,
    recipe: Recipe,
    settings: Iterable[Setting],
    measure: Measure = everything,
) -> Iterator[Row]:
    """A row for each setting; settings that only decide differently share a training."""
    parts = task.parts(seed, noise)
    sizes, x = [*map(len, parts)], torch.cat([part.x for part in parts])
    cluster = clusters(parts[1].x)
    trained_on: dict[str, tuple[Tensor, Tensor | None]] = {}
    for setting in settings:
        kind = PLAIN if setting.moved else setting.name
        if kind not in trained_on:
            taken: list[Trainer] = []
            own = replace(recipe, steps=round(setting.steps * recipe.steps))
            model = train(parts[0], setting.how, own, seed, taken.append)
            trained_on[kind] = outputs_of(model, x), taken[0].held
        outputs, held = trained_on[kind]
        logits = moved(outputs, parts[0].y, setting.moved).split(sizes)
        row: Row = {"noise": noise, "seed": seed, "method": setting.method}
        row |= {"setting": setting.name, "told": setting.told}
        numbers = measure(Trained(task, parts, logits, held, cluster))
        yield row | {name: round(value, 4) for name, value in numbers.items()}


def sweep(
    tasks: Iterable[Task],
    seeds: Iterable[int],
    noises: Iterable[float],
    folder: Path,
    recipe: Recipe,
    settings: Callable[[Task, float], Iterable[Setting]],
    measure: Measure = everything,
) -> None:
    """Run what is not in the folder's tables yet: of each task, at each noise, these settings."""
    tasks, noises = list(tasks), list(noises)
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"recipe": {"optimizer": "Adam, cosine decay to 0", **asdict(recipe)}}
    about = json.dumps(report.header(**shared), indent=1) + "\n"
    for seed, noise, task in ((s, n, t) for s in seeds for n in noises for t in tasks):
        path = folder / f"{task.name}.csv"
        done = finished(path)
        wanted = [s for s in settings(task, noise) if (noise, seed, s.name) not in done]
        if wanted:
            (folder / "how.json").write_text(about, encoding="utf-8")
            print(f"seed {seed}, noise {noise:g}, {task.name}: {len(wanted)}", flush=True)
            for row in rows_of(task, seed, noise, recipe, wanted, measure):
                append(path, row)


def finished(path: Path) -> set[tuple[float, int, str]]:
    """Noise, seed and setting of the rows that a table has."""
    if not path.exists():
        return set()
    return set(pd.read_csv(path, usecols=KEY).itertuples(index=False, name=None))


def append(path: Path, row: Row) -> None:
    """Each run at once, so that nothing is lost when the sweep is stopped."""
    named = pd.DataFrame([{**row, "noise": f"{row['noise']:g}"}])
    named.to_csv(path, mode="a", header=not path.exists(), index=False, lineterminator="\n")


def main(given: Sequence[str]) -> None:
    several = {"nargs": "+"}
    chosen = report.options(
        __doc__,
        given,
        tasks={**several, "choices": TASKS, "default": list(TASKS)},
        seeds={**several, "type": int, "help": "0 to 4; with --search 100 to 102"},
        noise={**several, "type": float, "default": NOISES},
        slow="the slow recipe, fewer methods",
        search="for one setting for all data sets",
    )
    for name in chosen.tasks:
        if not TASKS[name].available:
            print(f"{name}: no data, left out (IRW_OPTIM_DATA)")
    tasks = [TASKS[name] for name in chosen.tasks if TASKS[name].available]
    seeds = chosen.seeds or (range(100, 103) if chosen.search else range(5))
    if chosen.slow:
        sweep(tasks, seeds, [0.0], RESULTS_SLOW, SLOW, slowly)
    elif chosen.search:
        noisy = [task for task in tasks if task.name in NOISY]
        sweep(tasks, seeds, [0.0], RESULTS_SEARCH, Recipe(), searched)
        sweep(noisy, seeds, [0.1, 0.2], RESULTS_SEARCH, Recipe(), searched)
    else:
        sweep(tasks, seeds, chosen.noise, RESULTS, Recipe(), settings_of)
