"""The data of all benchmarks: files, tables with groups, what is planted in them, the tasks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # for its loader of Adult
