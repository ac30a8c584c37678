"""Rows in other tools' hands: CSV, pandas, TensorBoard, Lightning; and the figure."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from monitored_runs import train
from torch import nn

from irw_optim import DBSCANFilter, IRWMonitor


@pytest.fixture(scope="module")
def monitor() -> IRWMonitor:
    return train(epochs=2, warmup_steps=10, class_balance=True, outliers=DBSCANFilter(quantile=0.8))


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag, global_step] = scalar_value


def test_a_csv_file_has_a_line_a_row(monitor: IRWMonitor, tmp_path: Path) -> None:
    monitor.to_csv(tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(monitor)
    for line, row in zip(lines, monitor.rows(), strict=True):
        assert float(line["worst_alpha_loss"]) == row["worst_alpha_loss"]
        assert {name for name, text in line.items() if text} == set(row)


def test_a_frame_has_the_steps_as_index(monitor: IRWMonitor) -> None:
    pd = pytest.importorskip("pandas")
    frame = monitor.frame()
    assert frame.index.tolist() == list(range(1, 41))
    assert frame["weight/class_1"].tolist() == [row["weight/class_1"] for row in monitor.rows()]
    assert isinstance(frame, pd.DataFrame)


def test_a_frame_of_nothing() -> None:
    pytest.importorskip("pandas")
    assert train(epochs=0).frame().empty


def test_a_writer_has_all_rows_once_whenever_it_comes() -> None:
    early, late = Writer(), Writer()
    monitor = train(epochs=0, class_balance=True)
    monitor.log_to(early)
    continued = monitor.optimizer
    model, criterion = continued.engine.model, continued.criterion
    assert isinstance(model, nn.Module)
    assert criterion is not None
    from monitored_runs import majority_and_minority

    x, y, _ = majority_and_minority(90)
    for inputs, target in zip(x.split(30), y.split(30), strict=True):
        continued.zero_grad()
        criterion(model(inputs), target).backward()
        continued.step()
    monitor.log_to(late)
    assert early.scalars == late.scalars
    assert {step for _, step in early.scalars} == {1, 2, 3}
    assert ("irw/weight/class_1", 3) in early.scalars
    assert not any("held" in tag for tag, _ in early.scalars), "what is not known is left out"
    assert early.scalars["irw/mean_loss", 2] == monitor.rows()[1]["mean_loss"]


def summary_writer(path: Path) -> tuple[Any, str]:
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(path))
    return writer, str(path)


def lightning_s_logger(path: Path) -> tuple[Any, str]:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.TensorBoardLogger(path)
    return logger, logger.log_dir


@pytest.mark.parametrize("make", [summary_writer, lightning_s_logger])
def test_what_tensorboard_shows(
    make: Callable[[Path], tuple[Any, str]], monitor: IRWMonitor, tmp_path: Path
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer, folder = make(tmp_path)
    train_rows = monitor.rows()
    monitor.log_to(writer)
    getattr(writer, "experiment", writer).close()
    monitor._loggers.clear()
    read = events.EventAccumulator(folder)
    read.Reload()
    logged = read.Scalars("irw/effective_share")
    assert [event.step for event in logged] == [row["step"] for row in train_rows]
    assert [event.value for event in logged] == pytest.approx(
        [row["effective_share"] for row in train_rows], rel=1e-5
    )
    assert {"irw/weight/class_0", "irw/removed/group_1"} <= set(read.Tags()["scalars"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory")
def test_lightning_s_logger_while_lightning_trains(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from irw_optim import IRWOptimizer

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 3)
            self.criterion = nn.CrossEntropyLoss()

        def configure_optimizers(self) -> Any:
            optimizer = IRWOptimizer(
                torch.optim.SGD(self.parameters(), lr=0.1),
                alpha=0.3,
                model=self,
                criterion=self.criterion,
            )
            self.monitor = IRWMonitor(optimizer)
            self.monitor.log_to(self.logger)
            return optimizer

        def training_step(self, batch: Any, index: int) -> Any:
            x, y, groups = batch
            self.monitor.groups(groups)
            return self.criterion(self.net(x), y)

    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    data = TensorDataset(torch.randn(32, 5), torch.arange(32) % 3, torch.arange(32) % 2)
    module = Classifier()
    trainer.fit(module, DataLoader(data, batch_size=8))
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = module.monitor.rows()
    assert [int(line["step"]) for line in lines] == [row["step"] for row in rows] == [*range(1, 9)]
    for line, row in zip(lines, rows, strict=True):
        assert float(line["irw/worst_alpha_loss"]) == pytest.approx(row["worst_alpha_loss"])
        assert float(line["irw/weight/group_1"]) == pytest.approx(row["weight/group_1"])


@pytest.mark.parametrize("logger", ["runs/", None, Writer, object()])
def test_what_is_no_logger(logger: Any) -> None:
    monitor = train(epochs=0)
    with pytest.raises(TypeError, match=r"logger=.*SummaryWriter, a Lightning logger"):
        monitor.log_to(logger)


def titles(monitor: IRWMonitor) -> list[str]:
    return [axes.get_title(loc="left") for axes in monitor.plot().axes]


def test_the_figure_answers_what_the_rows_can(monitor: IRWMonitor) -> None:
    pytest.importorskip("matplotlib")
    assert titles(monitor)[:6] == [
        "Losses of a batch",
        "Who carries a step",
        "Share of the weight, by class",
        "Share of the weight, by group",
        "Mean loss, by group",
        "Removed by the outlier filter",
    ]
    assert "Share of the weight, by group" not in titles(train(epochs=1, tell_groups=False))
    held = train(epochs=1, scheme={"refresh": 5, "unit": "steps"})
    assert "Do held weights still know the worst-off?" in titles(held)


def test_the_lines_of_the_figure_are_the_rows(monitor: IRWMonitor) -> None:
    pytest.importorskip("matplotlib")
    figure = monitor.plot()
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    rows = monitor.rows()
    assert lines["all, mean"].get_ydata().tolist() == pytest.approx([r["mean_loss"] for r in rows])
    assert lines["all, mean"].get_xdata().tolist() == [row["step"] for row in rows]
    assert lines["class 1"].get_ydata().tolist() == pytest.approx(
        [row["weight/class_1"] for row in rows]
    )


def test_there_is_no_figure_of_nothing() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(RuntimeError, match="nothing was recorded yet"):
        train(epochs=0).plot()


@pytest.mark.parametrize(("library", "call"), [("pandas", "frame"), ("matplotlib", "plot")])
def test_without_the_extra_the_error_names_it(
    monitor: IRWMonitor, monkeypatch: pytest.MonkeyPatch, library: str, call: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "irw_optim.monitor.figures", raising=False)
    with pytest.raises(ImportError, match=rf'{call}\(\) needs {library}: .*"irw-optim\[report\]"'):
        getattr(monitor, call)()


def test_importing_the_package_imports_none_of_them() -> None:
    optional = "{'pandas', 'matplotlib', 'fairlearn', 'tensorboard', 'lightning'}"
    script = f"import sys, irw_optim; print(sorted({optional} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert printed.stdout.decode().strip() == "[]"
