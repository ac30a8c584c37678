"""The zoo of benchmarks: its models are built, its numbers are exact, its table says so."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

import pytest
import torch
from torch import nn

from benchmarks.zoo import compiled, exactness, measuring, report
from benchmarks.zoo.entry import Entry, rows, texts
from benchmarks.zoo.registry import ENTRIES, GROWING, named

OTHERS = {"PEFT": "peft"} | dict.fromkeys(
    {e.family for e in ENTRIES if e.family.startswith("transformers")}, "transformers"
)
TINY = ("MLP, one hidden layer", "MLP, BatchNorm, dropout", "Bag of words")


def version(package: str) -> tuple[int, ...]:
    if importlib.util.find_spec(package) is None:
        return ()
    return tuple(int(part) for part in __import__(package).__version__.split(".")[:2])


def built(entry: Entry):
    """A case of a test; the imports of other packages take seconds."""
    return pytest.param(entry, id=entry.name, marks=[pytest.mark.slow] * (entry.family in OTHERS))


def test_names_are_unique_and_many():
    assert max(Counter(entry.name for entry in ENTRIES).values()) == 1
    assert len(ENTRIES) >= 60
    assert len([e for e in ENTRIES if e.family.startswith("transformers")]) >= 25
    assert set(GROWING) <= {entry.name for entry in ENTRIES}
    with pytest.raises(KeyError, match="--list"):
        named("no such model")


@pytest.mark.filterwarnings("ignore")  # of the libraries whose models these are
@pytest.mark.parametrize("entry", list(map(built, ENTRIES)))
def test_every_entry_gives_a_loss_for_each_sample(entry):
    package = OTHERS.get(entry.family)
    newest = {"transformers": (5, 0), "peft": (0, 19)}
    if package and version(package) < newest[package]:
        pytest.skip(f"the zoo takes families of {package} that this version lacks")
    model, (inputs, target) = entry.make(), entry.draw(2)
    assert model.training
    with torch.no_grad():
        output = model(*inputs)
    assert len(output) == len(target) == 2
    if entry.losses is not None:
        assert entry.losses(output, target).shape == (2,)


@pytest.mark.parametrize("name", TINY)
def test_a_step_is_the_loop_of_autograd(name):
    found = exactness.errors(named(name), 16)
    assert found["weights_error"] < report.EXACT
    assert found["gradient_error"] < report.EXACT


def test_a_wrong_gradient_shows(monkeypatch):
    right = exactness.irw
    monkeypatch.setattr(exactness, "irw", lambda losses, G: right(losses, G).flip(0))
    assert exactness.errors(named(TINY[0]), 16)["gradient_error"] > 1e-3


def test_what_a_model_computes_in_float32_is_followed_in_float64():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(24, 2)

        def forward(self, x):
            x = x.to(torch.float32).float() * torch.ones(24, dtype=torch.float32)
            return self.linear(x.to(self.linear.weight.dtype)).softmax(1, dtype=torch.float32)

    found = exactness.errors(Entry("narrow", "here", 8, Narrow, rows(24)), 8)
    assert max(found["weights_error"], found["gradient_error"]) < report.EXACT


def test_cost_says_how_it_was_measured():
    found = measuring.cost(named("MLP, BatchNorm, dropout"), 8, seconds=0.01)
    assert found["batch_norm"]
    assert found["pairs"] >= measuring.FEWEST
    assert min(found[what] for what in ("time", "memory", "milliseconds", "megabytes")) > 0


def test_the_table_is_sorted_and_names_what_failed():
    found = [
        {"name": n, "size": 8, "milliseconds": 6.0, "time": t, "memory": 1.5, "path": "quick",
         "batch_norm": False, "weights_error": e, "gradient_error": 0.0}
        for n, t, e in [("cheap", 1.5, 1e-15), ("dear", 3.0, 1e-3)]
    ]  # fmt: skip
    found.append({"name": "broken", "fails": "ValueError: a | b"})
    lines = report.as_markdown(found).splitlines()
    shown = [line for line in lines if line.startswith(("| cheap", "| dear", "| broken"))]
    assert [row.split()[1] for row in shown] == ["dear", "cheap", "broken"]
    assert r"fails: ValueError: a \| b" in shown[-1]
    assert "Exact to 1e-10 in float64: 1 of 2." in lines
    assert report.summary(found[:2])["5 ms and more"]["time"] == [2.25, 2.85, 3.0]


def test_growth_says_how_far_the_ratios_are_apart():
    points = [{"size": 16, "time": 2.0, "memory": 1.5}, {"size": 64, "time": 3.0, "memory": 1.6}]
    text = report.growth_as_markdown({"model": [*points, {"size": 256, "fails": "too long"}]})
    assert text.endswith("| model | 2.00 / 1.50 | 3.00 / 1.60 | fails | 1.50 |\n")


def test_batches_and_models_are_the_same_for_the_same_seed():
    entry = Entry("here", "here", 4, lambda: nn.Linear(3, 2), texts(5))
    assert torch.equal(entry.make().weight, entry.make().weight)
    (one,), following = entry.draw()
    (other,), _ = entry.draw()
    assert torch.equal(one, other)
    assert torch.equal(one[:, 1:], following[:, :-1])


def test_what_torch_compile_makes_of_a_model(monkeypatch):
    pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: None)  # of a process of its own
    found = compiled.looked_at(named("MLP, BatchNorm, dropout"), "aot_eager", "before")
    assert found["layers"] == 5
    assert found["plain"]["graphs"] == 2
    assert found["plain"]["breaks"] == 0
    assert found["ours"]["error"] < compiled.EXACT
    assert found["ours"]["compiled_in_epochs"][2] == 0


def test_the_table_of_compiled_models_says_what_is_wrong():
    part = {"breaks": 0, "graphs": 2, "compiled_in_epochs": [2, 0, 0], "limits": 0}
    ours = part | {"error": 1e-15, "left_uncompiled": False}
    key = {"backend": "aot_eager", "order": "before", "layers": 2, "float32": False}
    wrong = [
        {"error": 1e-6},
        {"breaks": 5},
        {"compiled_in_epochs": [2, 0, 1]},
        {"limits": 1},
        {"left_uncompiled": True},
        {"graphs": 0},
        {},
    ]
    found = [key | {"name": str(n), "plain": part, "ours": ours | w} for n, w in enumerate(wrong)]
    found.append(key | {"name": "broken", "fails": "took more | than 240 s"})
    cells = compiled.summary(found).splitlines()[-1].split("|")[3:-1]
    assert [cell.strip() for cell in cells] == ["8", "7", "6", "5", "1", "1", "1", "1", "1 (0)"]
    assert r"fails: took more \| than 240 s" in compiled.as_markdown(found)


def test_the_stored_table_is_made_of_the_stored_rows():
    models = json.loads(compiled.RESULTS.read_text())["models"]
    for name, make in (("", compiled.as_markdown), ("_summary", compiled.summary)):
        assert compiled.RESULTS.with_name(f"zoo_compiled{name}.md").read_text() == make(models)
    page = (compiled.report.ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for model in models:
        assert compiled.is_exact(model) or f"{model['name']} " in page, model["name"]
