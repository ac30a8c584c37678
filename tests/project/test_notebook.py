"""What a notebook shows of the library's objects."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from irw_optim import IRWMonitor, IRWOptimizer
from irw_optim.notebook import html_table, in_a_notebook, progress_bar


def trained():
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.25, model=model, criterion=criterion)
    monitor = IRWMonitor(optimizer)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    for _ in range(6):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return optimizer, monitor


def test_a_table_of_any_text():
    shown = "<table><tr><th>module</th></tr><tr><td>a &lt; b</td></tr></table>"
    assert html_table(["module"], [["a < b"]]) == shown


def test_the_newest_step():
    record = trained()[0].last_step
    shown = record._repr_html_()
    assert "<td>worst off</td><td>2</td>" in shown
    assert f"<td>{int(record.weights.argmax())}</td>" in shown
    assert str(record).startswith("samples 8, worst off 2, outliers 0")


def test_the_monitor_shows_its_newest_rows_and_what_it_found():
    monitor = trained()[1]
    shown = monitor._repr_html_()
    assert shown.count("<tr>") == 1 + 5
    for finding in monitor.diagnose():
        assert finding.name in shown


def test_a_monitor_without_rows_has_something_to_show():
    optimizer, monitor = trained()
    monitor.detach()
    assert "<table>" in IRWMonitor(optimizer)._repr_html_()


@pytest.fixture
def notebook(monkeypatch):
    """A notebook's kernel."""
    pytest.importorskip("tqdm", reason="bars need the report extra")
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_a_bar_shows_what_goes_on_and_goes(notebook, capsys):
    with progress_bar("first", 10, shown=True) as advance:
        advance(4)
        advance(0, "then")
    written = capsys.readouterr().err
    assert "first:   0%" in written
    assert "then:  40%" in written
    assert not written.rpartition("\r")[0].rpartition("\r")[2].strip()


def test_no_bar_that_nobody_asked_for(notebook, capsys):
    with progress_bar("", 1, shown=False) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_no_bar_in_a_file(capsys):
    pytest.importorskip("tqdm", reason="bars need the report extra")
    with progress_bar("", 1, shown=True) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_ipython_on_a_terminal_is_no_notebook(monkeypatch):
    for shell in (None, object()):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda s=shell: s))
        assert not in_a_notebook()


def test_a_figure_is_shown_without_pyplot():
    pytest.importorskip("matplotlib", reason="plot needs the report extra")
    assert trained()[1].plot()._repr_png_().startswith(b"\x89PNG")
