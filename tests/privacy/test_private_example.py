"""The private example on a few people: the whole of it runs, and its numbers are what it says."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

for library in ("fairlearn", "matplotlib", "pandas", "rich"):
    pytest.importorskip(library, reason="the examples need the report extra")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
example = importlib.import_module("private_adult")


@pytest.fixture(scope="module")
def few():
    """Every fortieth person of each split."""
    people = example.load_adult()
    chosen = [slice(None, None, 40)] * 2
    return [
        type(p)(p.features[s], p.labels[s], p.groups.iloc[s].reset_index(drop=True))
        for p, s in zip(people, chosen, strict=True)
    ]


def test_the_planted_minority_is_marked_and_has_the_other_label(few):
    task = example.planted(*few)
    x, y = task.train.tensors
    marked = x[:, -1] == 1
    assert marked.float().mean() == pytest.approx(0.08, abs=0.03)
    original = torch.as_tensor(few[0].labels)
    assert torch.equal(y[marked], 1 - original[marked])
    assert torch.equal(y[~marked], original[~marked])
    assert (task.groups == "minority").mean() == pytest.approx(0.08, abs=0.03)


def test_the_metrics_are_those_of_the_predictions(few):
    task = example.adult(*few)

    class Known(torch.nn.Module):
        def forward(self, x):
            return torch.stack([torch.zeros(len(x)), x[:, 0]], 1)

    found = example.evaluate(task, Known())
    correct = (task.x[:, 0] > 0).long() == task.y
    losses = torch.nn.functional.cross_entropy(Known()(task.x), task.y, reduction="none")
    groups = [correct[(task.groups == g).tolist()].float().mean() for g in set(task.groups)]
    worst = losses.sort(descending=True).values[: round(0.3 * len(losses))]
    assert found["accuracy"] == pytest.approx(100 * correct.float().mean().item())
    assert found["worst group"] == pytest.approx(100 * min(groups).item())
    assert found["mean loss"] == pytest.approx(losses.mean().item())
    assert found["tail loss"] == pytest.approx(worst.mean().item())


@pytest.mark.slow
def test_the_whole_of_it_on_a_few_people(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "EPSILONS", (8.0,))
    monkeypatch.setattr(example, "BATCH_SIZE", 128)
    monkeypatch.setattr(example, "load_adult", lambda: few)
    monkeypatch.setattr(
        sys, "argv", ["private_adult.py", "--seeds", "2", "--epochs", "1", "--out", str(tmp_path)]
    )
    example.main()
    runs = example.pd.read_csv(tmp_path / "runs.csv")
    assert len(runs) == 2 * 2 * 4  # tasks, seeds, three private methods and the plain one
    assert set(runs["method"]) == {*example.CONFIGS, "not private"}
    assert runs[["accuracy", "worst group", "mean loss", "tail loss"]].notna().all().all()
    assert (tmp_path / "private_adult.svg").stat().st_size > 1000
    assert "planted minority" in capsys.readouterr().out
