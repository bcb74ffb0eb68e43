"""What contracts share: the runs of a session, and processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.contracts.families import lacking

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    """Leave out the pairs marked `contracts_all`, unless -m names that mark. Tests that share a run are for one process of pytest-xdist."""
    for item in items:
        if item.get_closest_marker("parametrize") and item.path.parent == HERE and {"method", "family"} <= item.callspec.params.keys():
            item.add_marker(pytest.mark.xdist_group("-".join(item.callspec.params[key] for key in ("method", "family"))))
    if "contracts_all" not in (config.option.markexpr or ""):
        left_out = [item for item in items if item.get_closest_marker("contracts_all")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def installed_here(request):
    """Older versions of diffusers and transformers lack some families, which are skipped."""
    if why := lacking(getattr(request.node, "callspec", None) and request.node.callspec.params.get("family") or ""):
        pytest.skip(why)


@pytest.fixture(autouse=True)
def one_thread():
    """The order of sums depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    from tests.contracts.running import Runs

    return Runs(tmp_path_factory.mktemp("contracts"))
