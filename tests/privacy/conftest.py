from pathlib import Path

import pytest

# Said by Opacus on every use, and not about this library.
EXPECTED = (
    "ignore:Secure RNG turned off:UserWarning",
    "ignore:GDP accounting is experimental:UserWarning",
    "ignore:Optimal order is the (largest|smallest) alpha:UserWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:  # pytest hands over those of all folders
            for warning in EXPECTED:
                item.add_marker(pytest.mark.filterwarnings(warning))
