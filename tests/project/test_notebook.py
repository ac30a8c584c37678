"""What a notebook shows of the library's objects."""

from __future__ import annotations

import torch
from torch import nn

from irw_optim import IRWMonitor, IRWOptimizer


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
