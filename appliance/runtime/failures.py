"""What goes wrong while a card gets ready, told as what it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from subprocess import CalledProcessError

from appliance.memory.planner import MemoryPlan, PlanError
from quant.errors import InputError

NO_COMPILER = "Failed to find C compiler"  # Triton's words


@contextmanager
def told(plan: MemoryPlan) -> Iterator[None]:
    """What goes wrong with a card is told as what it is: a plan that was wrong, no compiler, a kernel that does not compile."""
    try:
        yield
    except CalledProcessError as error:  # Triton's: a launcher in C for each kernel
        raise InputError(no_compiler(plan, f"{error.cmd[0]} fails")) from error
    except RuntimeError as error:  # torch's own kind, CUDA's and Triton's
        if NO_COMPILER in str(error):
            raise InputError(no_compiler(plan, "there is none")) from error
        if "out of memory" not in str(error).lower():
            raise
        share = "--kv-cache-memory-bytes" if "--kv-cache-memory-bytes" in plan.budget_source else "--gpu-memory-utilization"
        remedies = [f"a smaller {share}", "a smaller --max-num-batched-tokens"] + ["--enforce-eager"] * bool(plan.graphs)
        raise PlanError(
            f"{plan.model}: {plan.device.name} ran out of memory before it was ready: try {', or '.join(remedies)} "
            f"({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        if not type(error).__module__.startswith("triton."):
            raise
        first = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"--device cuda: Triton {version('triton')} does not make a kernel for {plan.device.name} "
            f"({type(error).__name__}: {first}); --device cpu serves this model"
        ) from error


def no_compiler(plan: MemoryPlan, found: str) -> str:
    return (
        f"--device cuda: Triton needs a C compiler and Python's headers to launch kernels on {plan.device.name}, and {found}: "
        "apt install gcc python3-dev (or the like), or --device cpu"
    )
