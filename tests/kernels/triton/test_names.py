"""Arguments of kernels have names that Triton's launcher can bind.

On a card it writes a function with the kernel's arguments, and with names of its own among them: an argument called ``params`` is
overwritten there before it is looked at, and no launch succeeds. The interpreter does not mind.
"""

from __future__ import annotations

import ast
from pathlib import Path

TAKEN = {"params", "specialization", "options", "backend", "specialize_impl", "JITCallable", "grid", "warmup"}


def test_no_argument_has_a_name_of_the_launcher() -> None:
    found = []
    for path in (Path(__file__).parents[3] / "kernels" / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list):
                found += [f"{path.name}:{node.name}:{a.arg}" for a in node.args.args if a.arg in TAKEN]
    assert not found
