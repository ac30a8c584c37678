"""The examples that are tutorials: each runs from its command, on little, and ends in a table."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from irw_optim import IRWOptimizer

pytest.importorskip("matplotlib", reason="the examples need the report extra")
pd = pytest.importorskip("pandas", reason="the examples need the report extra")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

find_who_suffers = importlib.import_module("find_who_suffers")


def rows_of(printed: str, names: tuple[str, ...]) -> list[list[float]]:
    """The numbers behind each name, which begins a line; the last table that has it counts."""
    found = []
    for name in names:
        line = [line for line in printed.splitlines() if line.startswith(f"{name} ")][-1]
        found.append([float(number) for number in re.findall(r"\d+\.\d+", line[len(name) :])])
    return found


def same_shape(printed: str, page: str) -> bool:
    """Whether what the documentation shows has the headings and rows that are printed now."""

    def words(text: str) -> list[str]:
        *_, table = re.findall(r"(?:^ {4,}.*accuracy.*\n)(?:\S.*\n?)+", text, re.MULTILINE)
        return re.findall(r"[^\W\d]+", table)

    shown = (Path(__file__).parents[2] / "docs/outputs" / f"{page}.txt").read_text("utf-8")
    return words(printed) == words(shown)


class TestFindWhoSuffers:
    example = find_who_suffers

    def test_runs(self, tmp_path, capsys):
        picture = tmp_path / "who.png"
        small = ["--people", "2000", "--epochs", "2", "--seeds", "2", "--save", str(picture)]
        self.example.main(small)
        printed = capsys.readouterr().out
        for number in "1234":
            assert f"{number}. " in printed
        assert re.search(r"^(Take|No remedy is clearly better) ", printed, re.MULTILINE)
        assert "nan" not in printed.lower()
        assert same_shape(printed, "find_who_suffers")
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_the_rehearsal_changes_nothing_and_its_shares_are_shares(self):
        people = self.example.load_adult()[0].part(range(1000))
        torch.manual_seed(0)
        model = self.example.network(people)
        before = [p.clone() for p in model.parameters()]
        shares = self.example.rehearse(model, people)
        assert all(map(torch.equal, model.parameters(), before))
        assert shares["weight"].sum() == pytest.approx(100, abs=1e-3)
        # each batch counts alike, also the last and shorter one
        assert shares["people"].sum() == pytest.approx(100, abs=1e-3)


class TestImageBatchNorm:
    def test_runs(self, tmp_path, capsys):
        example = importlib.import_module("image_batchnorm")
        picture = tmp_path / "digits.png"
        example.main(["--seeds", "1", "--epochs", "1", "--save", str(picture)])
        printed = capsys.readouterr().out
        assert "EXACT" in printed
        assert "autodiff" in printed
        assert same_shape(printed, "image_batchnorm")
        for numbers in rows_of(printed, tuple(example.methods(1))):
            assert len(numbers) == 6  # three columns, mean and spread
            assert all(0 <= number <= 100 for number in numbers)
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_eights_and_nines_are_rare_in_training_only(self):
        example = importlib.import_module("image_batchnorm")
        (x, y), (x_test, y_test) = example.rare_digits(seed=0)
        share, in_test = ((t >= 8).float().mean() for t in (y, y_test))
        assert share < 0.04 < 0.15 < in_test
        assert x.shape[1:] == x_test.shape[1:] == (1, 8, 8)


@pytest.mark.filterwarnings("ignore")  # Lightning's, about itself
class TestLightning:
    def test_runs(self, capsys):
        pytest.importorskip("lightning")
        example = importlib.import_module("lightning_adult")
        example.main(["--epochs", "1", "--people", "6000"])
        printed = capsys.readouterr().out
        for numbers in rows_of(printed, ("plain", "IRW")):
            assert len(numbers) == 3
        assert "irw/effective_share" in printed
        assert same_shape(printed, "lightning_adult")


@pytest.mark.filterwarnings("ignore")  # transformers', about itself
class TestHuggingFace:
    def test_runs(self, capsys, monkeypatch):
        pytest.importorskip("transformers")
        example = importlib.import_module("huggingface")
        made = []

        def wrapped(*args, **options):
            made.append(IRWOptimizer(*args, **options))
            return made[-1]

        monkeypatch.setattr(example, "IRWOptimizer", wrapped)
        example.main(["--epochs", "1", "--people", "400"])
        printed = capsys.readouterr().out
        assert same_shape(printed, "huggingface")
        plain, irw = rows_of(printed, ("plain", "IRW"))
        assert len(plain) == len(irw) == 5
        (optimizer,) = made
        assert optimizer.steps == 7  # batches of 64

    def test_race_and_sex_are_not_in_the_sentences(self):
        pytest.importorskip("transformers")
        example = importlib.import_module("huggingface")
        table = example.read_adult().head(500)
        swapped = table.assign(race=table["race"][::-1].values, sex=table["sex"][::-1].values)
        assert example.sentences(table) == example.sentences(swapped)
