"""What a training with `IRWOptimizer` does: recorded, shown, and diagnosed; never changed."""

import csv
from collections import deque
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize, proxy

from torch.optim import Optimizer

from irw_optim.arguments import check_state, whole_number
from irw_optim.attachments import Removable, Renewed, remove_all
from irw_optim.metrics._groups import GroupsLike, as_columns, check_lengths
from irw_optim.notebook import html_table
from irw_optim.optimizer import IRWOptimizer

from .recording import WeightAge, groups_of, row_of
from .rows import Array, Course, Logger, Row, send
from .signatures import Finding, diagnose

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


__all__ = ["Finding", "IRWMonitor"]


class IRWMonitor(Renewed):
    """Records what an `IRWOptimizer` decides, in bounded memory, and says what is wrong with it.

    A row is one step's `IRWOptimizer.last_step` in numbers (O(B) work, and one norm of ``p.grad``);
    no other step waits for the device. With more than ``capacity`` rows every second one is let go
    and the interval doubles: they cover the training evenly. Steps that a scaler skipped are none.

    Of several backward passes that add up to a step the newest is recorded, with
    ``accumulation_steps`` the whole logical batch; of several processes all samples that they weigh
    together, and by group this one's.

    Args:
        optimizer: the one that trains, or a proxy of it from Accelerate or Lightning.
        every: steps between rows, to begin with; the first one has a row, too.
        capacity: most rows that are kept, >= 10.

    Raises:
        TypeError, ValueError: an argument that is impossible.

    >>> import torch
    >>> from irw_optim import IRWOptimizer
    >>> _ = torch.manual_seed(0)
    >>> model, criterion = torch.nn.Linear(4, 2), torch.nn.CrossEntropyLoss()
    >>> optimizer = IRWOptimizer(
    ...     torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2, model=model, criterion=criterion
    ... )
    >>> monitor = IRWMonitor(optimizer, every=10)
    >>> for _ in range(40):
    ...     x = torch.randn(20, 4)
    ...     optimizer.zero_grad()
    ...     criterion(model(x), (x[:, 0] > 0).long()).backward()
    ...     monitor.groups(["f"] * 15 + ["m"] * 5)  # if they are known, for the evaluation
    ...     optimizer.step()
    >>> [row["step"] for row in monitor.rows()]
    [1, 10, 20, 30, 40]
    >>> first, *_, last = monitor.rows()
    >>> last["worst_alpha_loss"] < first["worst_alpha_loss"], last["samples/group_f"]
    (True, 0.75)
    >>> for finding in monitor.diagnose():
    ...     print(finding.name)
    too_few_records
    """

    PASSING = ("_handles", "_loggers", "_passes")

    def __init__(self, optimizer: Optimizer, *, every: int = 1, capacity: int = 1000) -> None:
        self.optimizer = _irw_optimizer(optimizer)
        every, capacity = whole_number("every", every, 1), whole_number("capacity", capacity, 10)
        self._course = Course(every, capacity)
        self._held = WeightAge()
        self._steps_before = self.optimizer.steps
        self.begin()

    def begin(self) -> None:
        """Set what copies, which go with the copy of the optimizer, do not carry, and listen."""
        self._loggers: list[Logger] = []
        self._passes: deque[dict[str, Array]] = deque(maxlen=self.optimizer.accumulation_steps)
        self._handles: list[Removable] = []
        finalize(self, remove_all, self._handles).atexit = False
        self._listen()

    def groups(self, groups: GroupsLike) -> None:
        """Say which groups the batch at hand is of, for the evaluation: training never sees them.

        To be called before ``optimizer.step()``, once for each backward pass.

        Args:
            groups: in the order of the batch, as of `irw_optim.metrics.group_accuracy`.

        Raises:
            ValueError: groups that do not fit, here or in ``step()``, before anything changes.
        """
        if self._course.due(self.optimizer.steps + 1):
            columns = as_columns(groups)
            check_lengths(**{f"groups[{name!r}]": column for name, column in columns.items()})
            for name, column in columns.items():
                if column.dtype.kind not in "biufU":  # dates, say, which are no plain data
                    columns[name] = column.astype(str)
            self._passes.append(columns)

    def log_to(self, logger: Logger) -> None:
        """Give a logger the rows so far and, until `detach`, every row when it is made.

        The names begin with ``irw/``, and the step is the optimizer's. Partitions into more than
        20 classes or groups, and numbers that are not known, are left out.

        Args:
            logger: of TensorBoard or Lightning, or whatever has ``add_scalar(tag, value, step)`` or
                ``log_metrics(metrics, step)``.

        Raises:
            TypeError: it has neither.
        """
        takes = hasattr(logger, "add_scalar") or hasattr(logger, "log_metrics")
        if isinstance(logger, type) or not takes:
            raise TypeError(
                f"logger={logger!r}: expected a TensorBoard SummaryWriter, a Lightning logger, "
                "or an object with add_scalar(tag, value, step) or log_metrics(metrics, step)"
            )
        for row in self._course.rows:
            send(row, logger)
        self._loggers.append(logger)
        self._listen()

    def detach(self) -> None:
        """Listen no longer; the rows stay."""
        remove_all(self._handles)
        self._loggers.clear()
        self._passes.clear()

    def __len__(self) -> int:
        """Rows kept."""
        return len(self._course.rows)

    @property
    def interval(self) -> int:
        """Steps between rows by now."""
        return self._course.interval

    def rows(self) -> list[dict[str, float]]:
        """One dictionary a recorded step; ``docs/diagnostics.md`` lists the columns."""
        return [row.flat() for row in self._course.rows]

    def frame(self) -> "pd.DataFrame":
        """The rows as a DataFrame with the steps as index; NaN where a row lacks a column.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                'frame() needs pandas: pip install "irw-optim[report]"; rows() and to_csv() do not'
            ) from error
        rows = self.rows()
        return pd.DataFrame(rows, columns=_columns_of(rows) or ["step"]).set_index("step")

    def to_csv(self, path: str | Path) -> None:
        """Write the rows to a CSV file, under their names; empty where a row lacks a column."""
        rows = self.rows()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _columns_of(rows))
            writer.writeheader()
            writer.writerows(rows)

    def plot(self) -> "Figure":
        """The course of the training as a matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: nothing was recorded yet.
        """
        try:
            from .figures import draw
        except ImportError as error:
            raise ImportError('plot() needs matplotlib: pip install "irw-optim[report]"') from error
        return draw(self._course.rows)

    def _repr_html_(self) -> str:
        rows = self.rows()[-5:]
        names = _columns_of(rows)
        cells = [[f"{row[name]:.4g}" if name in row else "" for name in names] for row in rows]
        found = "".join(f"<p>{escape(str(finding))}</p>" for finding in self.diagnose())
        return found + html_table(names, cells)

    def diagnose(self) -> list[Finding]:
        """The known ways to fail that the rows show: ``docs/diagnostics.md``."""
        return diagnose(self._course)

    def state_dict(self) -> dict[str, Any]:
        """Plain data, which ``torch.load(weights_only=True)`` takes."""
        return {
            "interval": self._course.interval,
            "rows": [row.state() for row in self._course.rows],
            "held": self._held.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the rows of a checkpoint, in place of those here."""
        check_state("state_dict", state_dict, *self.state_dict())
        course = Course(state_dict["interval"], self._course.capacity)
        for row in state_dict["rows"]:
            course.add(Row.of_state(row))
        self._held.load(state_dict["held"])
        self._course = course

    def _listen(self) -> None:
        """Hear of the steps; a monitor without a logger may be forgotten, and ends with that."""
        monitor = self if self._loggers else proxy(self)
        remove_all(self._handles)
        self._handles += [
            self.optimizer.register_step_pre_hook(lambda *_: monitor._before_step()),
            self.optimizer.register_step_post_hook(lambda *_: monitor._after_step()),
        ]

    def _before_step(self) -> None:
        self._steps_before = self.optimizer.steps
        given, pending = list(self._passes), self.optimizer._weighted.pending
        if given and pending:
            self._passes.clear()
            self._passes.append(groups_of(given, pending[-1]))

    def _after_step(self) -> None:
        passes = list(self._passes)
        self._passes.clear()
        step, record = self.optimizer.steps, self.optimizer.last_step
        if step == self._steps_before or record is None or not len(record.losses):
            return  # skipped, not on weights of ours, or on nobody
        held_for = self._held.age(self.optimizer.scheme, step)
        if not self._course.due(step):
            return
        if row := row_of(self.optimizer, record, held_for, passes):
            self._course.add(row)
            for logger in self._loggers:
                send(row, logger)


def _columns_of(rows: list[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _irw_optimizer(optimizer: Any) -> IRWOptimizer:
    inside = getattr(optimizer, "optimizer", None)  # of Accelerate's and Lightning's proxies
    for candidate in (inside, optimizer):
        if isinstance(candidate, IRWOptimizer):
            return candidate
    raise TypeError(
        f"optimizer is a {type(optimizer).__name__}: expected the IRWOptimizer that trains, as "
        "in IRWMonitor(IRWOptimizer(...)); a private one cannot be listened to, whose guarantee "
        "does not cover its samples' weights"
    )
