"""For pytest under scripts/gpu_check: notes each test that begins or fails, begins none twice, ends where the card is lost.

GPU_SHARD=i/n: the i-th of n parts of the tests, by their order.
"""

from __future__ import annotations

import os
import sys

import pytest

from scripts.gpu_children import Notebook

notebook = Notebook()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    part, _, parts = os.environ.get("GPU_SHARD", "0/1").partition("/")
    items[:] = [item for item in items[int(part) :: int(parts)] if item.nodeid not in notebook.begun]


def pytest_runtest_logstart(nodeid: str) -> None:
    notebook(begun=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        lines = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr)).splitlines()
        notebook(failed=report.nodeid, why=lines[0][:300] if lines else report.when)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if lost():
        item.session.shouldstop = f"the card is lost: after {item.nodeid} it does not answer"


def lost() -> bool:
    """Whether CUDA refuses all that is asked of it from now on, in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
