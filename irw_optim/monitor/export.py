"""Rows for other tools: loggers, CSV files, pandas."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from irw_optim.monitor.rows import Row

if TYPE_CHECKING:
    import pandas as pd

MOST_PARTS = 20
"""A logger is spared partitions with more parts: a thousand charts help nobody."""

PREFIX = "irw/"
"""Of the names in a logger, which shows what shares one together."""


class ScalarWriter(Protocol):
    """``torch.utils.tensorboard.SummaryWriter``, and whatever else takes one number."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take one number."""


class MetricsLogger(Protocol):
    """Any logger of Lightning's, and whatever else takes numbers by name."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> Any:
        """Take the numbers of one step."""


Logger: TypeAlias = ScalarWriter | MetricsLogger


def check_logger(logger: Any) -> Logger:
    """Return what can take rows, or raise a TypeError that says what can."""
    if isinstance(logger, type) or not (
        hasattr(logger, "add_scalar") or hasattr(logger, "log_metrics")
    ):
        raise TypeError(
            f"logger={logger!r}: expected a torch.utils.tensorboard.SummaryWriter, a Lightning "
            "logger such as CSVLogger(path), or an object with add_scalar(tag, value, step) or "
            "log_metrics(metrics, step)"
        )
    return logger  # type: ignore[no-any-return]


def send(row: Row, logger: Logger) -> None:
    """Give a row to a logger; what is not known in it (NaN) is left out."""
    numbers = row.flat(MOST_PARTS)
    del numbers["step"]
    known = {PREFIX + name: value for name, value in numbers.items() if not math.isnan(value)}
    if hasattr(logger, "log_metrics"):
        logger.log_metrics(known, step=row.step)
    else:
        for name, value in known.items():
            logger.add_scalar(name, value, row.step)


def columns_of(rows: Sequence[dict[str, float]]) -> list[str]:
    """Every column that a row has, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(rows: Sequence[dict[str, float]], path: str | Path) -> None:
    """One line a row under a line of names; empty where a row lacks the column."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)


def as_frame(rows: Sequence[dict[str, float]]) -> pd.DataFrame:
    """A pandas DataFrame with the steps as index.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            'frame() needs pandas: pip install "irw-optim[report]"; rows() and to_csv() do not'
        ) from error
    return pd.DataFrame(rows, columns=columns_of(rows) or ["step"]).set_index("step")
