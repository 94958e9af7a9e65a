"""What all tests share: real data where it is present, and one thread each for the arithmetic."""

from __future__ import annotations

import gc
import logging
import os
import sys

gc.disable()  # until all is collected: what importing and collecting make stays, and would be gone through again and again
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before torch is imported: several test processes share the machine
# Engines take all cores unless told otherwise. Where others have the second, a small product on two that wait for each other as
# they usually do, by looking again and again, takes 15 ms instead of 0.03.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["APPLIANCE_CACHE_DIR"] = ""  # what one test's engine measures is not for the next one's plan, nor for the user's

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("APPLIANCE_SHARED_DATA") or ROOT.parent / "shared" / "data")

settings.register_profile("default", deadline=None)  # a busy machine is no failure
settings.load_profile("default")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints, tokenizers and traces; APPLIANCE_SHARED_DATA names another place."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data: {SHARED} is absent (APPLIANCE_SHARED_DATA names another place)")
    return SHARED


SECONDS = {
    "kernels/triton/test_attention_compilations.py": 300,
    "kernels/triton/test_eight_compilations.py": 116,
    "kernels/triton/test_matmul_compilations.py": 94,
    "core/test_scheduler_histories.py": 90,
    "kernels/triton/test_emulated.py": 85,
    "kernels/triton/test_gate_compilations.py": 49,
    "kernels/triton/test_fp8.py": 49,
    "test_gpu_scripts.py": 48,
    "kernels/triton/test_elsewhere.py": 35,
    "server/test_real.py": 30,
    "tui/test_dashboard.py": 30,
    "server/test_several.py": 26,
    "test_autoawq.py": 25,
    "test_quantize_quality.py": 24,
    "server/test_web.py": 23,
    "kernels/test_amx_instructions.py": 21,
    "kernels/triton/test_attention.py": 20,
    "server/test_http.py": 20,
    "test_demo_model.py": 20,
    "models/test_against_transformers.py": 18,
    "test_hub.py": 18,
    "test_quality.py": 18,
    "kernels/triton/test_stack.py": 17,
    "runtime/test_memory_system.py": 17,
    "tui/test_child.py": 17,
    "runtime/test_beam.py": 17,
    "server/test_chat_command.py": 15,
    "memory/test_plan.py": 14,
    "server/test_faults_real.py": 14,
    "text/test_tokenizer.py": 12,
    "kernels/triton/test_rope.py": 10,
    "kernels/triton/test_many.py": 9,
    "text/test_template.py": 8,
    "kernels/triton/test_sampling.py": 7,
}
"""That files of tests take on a core of their own, where that says more than how many tests they have. Some of them wait.

What is compiled for cards is counted as where Triton's cache is empty, as in a new checkout; else it takes less."""
OF_A_TEST = 0.15  # seconds, in the mean


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whatever uses the real data is marked so, whether or not the test said it.

    Where several processes share the files (scripts/test), those that take longest come first, so that all end together.
    """
    if hasattr(config, "workerinput"):
        counts, here = Counter(item.path for item in items), Path(__file__).parent
        long = {path: SECONDS.get(path.relative_to(here).as_posix(), OF_A_TEST * count) for path, count in counts.items()}
        items.sort(key=lambda item: (-long[item.path], item.path))
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker("realdata")
        elif item.get_closest_marker("realdata") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no real data: {SHARED} is absent"))


def pytest_collection_finish() -> None:
    """A million objects that stay as long as the process are no concern of the collections to come, which took half a second."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Commands that are run in this process set up the log of theirs; the next test shall not read it on its stderr. Engines say
    how many threads torch has; the next test shall have one again."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
