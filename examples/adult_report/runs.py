"""The results of all runs, and the frames that table, figures and sentences are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
from adult_data import People

from adult_report.diary import Diary
from adult_report.evaluation import PARTITIONS, Evaluation

PLAIN = "plain"
"""The method that the others are compared with."""

MOVED = "plain, moved threshold"
"""Plain training, deciding as if the classes were equally frequent."""


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        method: its name.
        seed: of the initialisation and of the order of the batches; the methods share it.
        evaluation: on the test split.
        diary: of the training; None for a method that only decides differently.
        seconds: CPU time of the training.
    """

    method: str
    seed: int
    evaluation: Evaluation
    diary: Diary | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Runs:
    """All of them; a frame has one row a run, indexed by (method, seed).

    Attributes:
        runs: in the order in which they ran.
        train: the training split.
        test: the test split.
        alpha: share in (0, 1].
    """

    runs: list[Run]
    train: People
    test: People
    alpha: float

    @property
    def methods(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def trained_methods(self) -> list[str]:
        """Those with a training of their own."""
        return list(dict.fromkeys(run.method for run in self.runs if run.diary))

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    @property
    def counted_seeds(self) -> str:
        """For a sentence."""
        return f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"

    def metrics(self) -> pd.DataFrame:
        """One column for each metric."""
        return _frame({(run.method, run.seed): run.evaluation.metrics for run in self.runs})

    def accuracy(self, partition: str) -> pd.DataFrame:
        """One column for each group of the partition: its accuracy."""
        return _frame(
            {(run.method, run.seed): run.evaluation.accuracy[partition] for run in self.runs}
        )

    def weight_ratio(self, partition: str) -> pd.DataFrame:
        """One column for each group: its share of the weight over its share of the samples."""
        group = self.train.group_of(*PARTITIONS[partition])
        return self._of_diaries(lambda diary: diary.weight_ratio(group))

    def removed_share(self, partition: str) -> pd.DataFrame:
        """One column for each group: the share of its samples removed as outliers."""
        group = self.train.group_of(*PARTITIONS[partition])
        return self._of_diaries(lambda diary: diary.removed_share(group))

    def history(self, column: str) -> pd.DataFrame:
        """One column for each epoch, of a column of `Diary.history`."""
        return self._of_diaries(lambda diary: diary.history()[column])

    def largest_class_share(self) -> pd.Series[float]:
        """How much of a batch's weight lies on one class, on average: one number a method."""
        shares = self._of_diaries(lambda diary: {"share": diary.largest_class_share()})
        return shares["share"].groupby(level="method", sort=False).mean()

    def seconds(self) -> pd.Series[float]:
        """CPU time of one training, averaged over the seeds: one number a method."""
        frame = _frame({(r.method, r.seed): {"seconds": r.seconds} for r in self.runs if r.diary})
        return frame["seconds"].groupby(level="method", sort=False).mean()

    def _of_diaries(
        self, look: Callable[[Diary], Mapping[str, float] | pd.Series[float]]
    ) -> pd.DataFrame:
        return _frame({(run.method, run.seed): look(run.diary) for run in self.runs if run.diary})


def mean_and_sd(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Over the seeds: a row for each method; the sd is NaN for a single seed."""
    by_method = frame.groupby(level="method", sort=False)
    return by_method.mean(), by_method.std()


def _frame(rows: Mapping[tuple[str, int], Mapping[str, float] | pd.Series[float]]) -> pd.DataFrame:
    frame = pd.DataFrame([dict(row) for row in rows.values()])
    frame.index = pd.MultiIndex.from_tuples(rows, names=["method", "seed"])
    return frame
