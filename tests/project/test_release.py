"""What is released: one version, a citation that loads, packages that hold what they should."""

from __future__ import annotations

import datetime as dt
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import irw_optim

ROOT = Path(__file__).parents[2]


def test_the_citation_names_the_version_and_the_paper() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(irw_optim.__version__)}$", text, re.MULTILINE)
    assert "2411.03068" in text


def test_citation_and_changelog_name_the_same_release() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.search(r"^## \[(\S+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert released, "no section of a release, as in: ## [0.1.0] - 2026-11-23"
    version, date = released.groups()
    assert version == irw_optim.__version__
    dt.date.fromisoformat(date)
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {date}\n" in citation


def test_the_security_note_says_what_is_promised_and_how_to_report() -> None:
    note = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for heading in ("## What differentially private training guarantees", "## How to report"):
        assert heading in note


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel made from it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_wheel_is_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    information = f"irw_optim-{irw_optim.__version__}.dist-info/"
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "irw_optim").rglob("*.py")}
    assert sources <= names
    assert f"{information}licenses/LICENSE" in names
    assert {n for n in names if not n.startswith(information)} - sources <= {"irw_optim/py.typed"}


@pytest.mark.slow
def test_the_wheel_is_small(built: Path) -> None:
    """Python and its docstrings, of which there are a megabyte: no data, no pictures."""
    assert next(built.glob("*.whl")).stat().st_size < 300_000


@pytest.mark.slow
def test_the_wheel_is_described_by_what_the_readme_begins_with(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        description = wheel.read(name).decode().partition("\n\n")[2]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(line in readme for line in description.splitlines())
    assert "+ optimizer = IRWOptimizer(" in description
    assert "arxiv.org" in description
    # An index of packages has neither the pictures nor the sections.
    assert "<img" not in description
    assert "](#" not in description


@pytest.mark.slow
def test_the_source_distribution_can_be_tested_and_documented(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    for needed in ("README.md", "LICENSE", "CITATION.cff", "Makefile", "docs/conf.py"):
        assert needed in names
    assert {
        "tests/reference.py",
        "examples/adult.py",
        "irw_optim/optimizer/irw_optimizer.py",
    } <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"benchmarks", "docs", "examples", "irw_optim", "tests"}
    unwanted = re.compile(r"__pycache__|\.pyc$|_build|\.(pt|pkl|log)$|\.venv")
    assert not [name for name in names if unwanted.search(name)]


WITHOUT_THE_EXTRAS = """
import sys
sys.modules |= dict.fromkeys({extras})  # None there is what Python takes for absent
import torch
from torch import nn

model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
loader = [(torch.randn(8, 3), torch.randint(0, 2, (8,))) for _ in range(3)]
{example}
import irw_optim
assert optimizer.steps == 3
print(irw_optim.__file__)
"""
EXTRAS = {
    *("fairlearn", "matplotlib", "pandas", "tqdm", "pytest", "hypothesis"),
    *("accelerate", "lightning", "peft", "pytorch_optimizer", "schedulefree", "skorch"),
    *("tensorboard", "transformers"),
}


@pytest.mark.slow
def test_the_readme_runs_on_the_wheel_alone(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    diff = re.search(r"```diff\n(.*?)```", readme, re.DOTALL)
    assert diff
    example = "\n".join(line[2:] for line in diff[1].splitlines() if line[:1] in (" ", "+", ""))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRAS.format(extras=EXTRAS, example=example)],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "irw_optim" / "__init__.py"
