"""For pytest under scripts/gpu_check: notes each test that begins, fails or takes long, and each kernel that is compiled; begins
no test twice, and ends where the card is lost.

GPU_SHARD=i/n: the i-th of n parts of the tests, by their order.
"""

from __future__ import annotations

import os
import sys

import pytest
from gpu_children import Notebook, card_answers, own_folders

own_folders()
notebook = Notebook()
failed: set[str] = set()
SLOW_S = 10.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    part, _, parts = os.environ.get("GPU_SHARD", "0/1").partition("/")
    items[:] = [item for item in items[int(part) :: int(parts)] if item.nodeid not in notebook.begun]


def pytest_collection_finish(session: pytest.Session) -> None:
    if "triton" in sys.modules:
        notebook.compilations()


def pytest_runtest_logstart(nodeid: str) -> None:
    notebook(begun=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        failed.add(report.nodeid)
        lines = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr)).splitlines()
        notebook(failed=report.nodeid, why=lines[0][:300] if lines else report.when)
    if report.duration > SLOW_S:
        notebook(slow=report.nodeid, seconds=round(report.duration, 1))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if not card_answers(recording=item.nodeid in failed):
        item.session.shouldstop = f"the card is lost: after {item.nodeid} it does not answer"
