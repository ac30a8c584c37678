import pytest

# Said by Opacus and by torch's module hooks on every use; neither is about this library.
EXPECTED = (
    "ignore:Secure RNG turned off:UserWarning",
    "ignore:Full backward hook is firing:UserWarning",
    "ignore:GDP accounting is experimental:UserWarning",
    "ignore:Optimal order is the (largest|smallest) alpha:UserWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        for warning in EXPECTED:
            item.add_marker(pytest.mark.filterwarnings(warning))
