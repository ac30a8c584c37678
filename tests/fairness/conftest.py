"""The benchmark is part of the repository, not of the package: its folder must be on the path."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("pandas", reason="the benchmark needs the report extra")
sys.path.insert(0, str(Path(__file__).parents[2]))
