"""The benchmark is part of the repository, not of the package: its folder must be on the path."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

# Without the report extra there is nothing to test here.
collect_ignore_glob = [] if find_spec("pandas") else ["test_*.py"]
