"""House rules that a machine can check: who imports whom, what stays free of torch and of the edge's libraries, lengths."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("quant", "kernels", "models", "appliance")
EDGE = {"fastapi", "starlette", "pydantic", "textual", "rich", "cyclopts", "uvicorn", "prometheus_client"}
TORCH = {"torch", "transformers", "triton"}  # and what imports torch by itself

# part (a module or a package; the longest that fits decides) -> what it may import of ours, beside itself
MAY_IMPORT = {
    "quant": [],
    "kernels": ["quant.tensor", "quant.errors", "quant.extension"],
    "models": ["quant", "kernels"],
    # appliance/__init__.py: lazy names
    "appliance": ["appliance.version", "appliance.core.params", "appliance.llm", "appliance.lora"],
    "appliance.version": [],
    "appliance.config": ["quant.errors"],
    "appliance.core": ["quant.errors", "appliance.config"],
    "appliance.adapters": ["quant.errors", "models.spec", "models.adaptable", "models.adapter_config", "appliance.config"],
    "appliance.memory": ["quant", "kernels.layout", "models.spec", "models.adaptable", "models.module", "appliance.adapters",
                         "appliance.config", "appliance.core"],
    "appliance.text": ["quant", "appliance.config", "appliance.core"],
    "appliance.runtime": ["quant", "kernels", "models", "appliance.adapters", "appliance.config", "appliance.core",
                          "appliance.memory", "appliance.version", "appliance.text.files", "appliance.text.grammar",
                          "appliance.text.tokenizer"],
    "appliance.llm": ["quant", "models", "appliance.config", "appliance.core", "appliance.memory", "appliance.runtime",
                      "appliance.text", "appliance.hub", "appliance.inputs", "appliance.outputs", "appliance.pooling",
                      "appliance.adapters", "appliance.lora"],
    "appliance.lora": ["quant.errors", "appliance.core.params", "appliance.runtime.adapters"],
    "appliance.inputs": ["quant.errors", "appliance.core"],
    "appliance.outputs": ["appliance.core", "appliance.text", "appliance.pooling"],
    "appliance.pooling": ["quant", "models.architectures", "appliance.core"],
    "appliance.doctor": ["quant.errors", "kernels.cpu.backend", "appliance.version", "appliance.memory", "appliance.diagnosis"],
    "appliance.diagnosis": ["appliance.memory"],
    "appliance.hub": ["quant", "models.spec", "appliance.adapters", "appliance.config"],
    "appliance.demo": [],
    "appliance.leash": [],
    "appliance.svg": [],
    "appliance.tls": ["quant.errors"],
    "appliance.bench": ["quant.errors", "appliance.config", "appliance.version", "appliance.svg", "appliance.tls"],
    "appliance.tui": ["quant.errors", "appliance.version", "appliance.core.messages", "appliance.leash", "appliance.tls"],
    "appliance.server": ["quant", "models.spec", "appliance.config", "appliance.version", "appliance.core", "appliance.memory",
                         "appliance.text", "appliance.runtime.client", "appliance.hub", "appliance.demo", "appliance.web",
                         "appliance.adapters", "appliance.models_file", "appliance.leash", "appliance.pooling"],
    "appliance.web": [],
    "appliance.chat": ["quant.errors", "appliance.leash", "appliance.tls"],
    "appliance.cli": ["appliance", "quant", "models.spec"],
    "appliance.cli_flags": ["quant.errors", "appliance.cli_foreign", "appliance.config"],
    "appliance.cli_foreign": [],
    "appliance.cli_help": [],
    "appliance.cli_sources": ["quant.errors", "appliance.config"],
    "appliance.eval": ["quant", "models.spec", "appliance.config", "appliance.core", "appliance.runtime", "appliance.llm",
                       "appliance.hub", "appliance.memory", "appliance.text", "appliance.quantize.calibration", "appliance.svg"],
    "appliance.quantize": ["quant", "models", "appliance.config", "appliance.hub", "appliance.memory", "appliance.text",
                           "appliance.plan_command", "appliance.runtime.options"],
    "appliance.models_file": ["quant.errors", "appliance.adapters", "appliance.config"],
    "appliance.plan_models": ["quant.errors", "appliance.config", "appliance.hub", "appliance.memory", "appliance.models_file",
                              "appliance.plan_command"],
    "appliance.plan_command": ["quant.errors", "quant.headers", "appliance.config", "appliance.hub", "appliance.memory",
                               "appliance.runtime.check_process"],
    "appliance.__main__": ["appliance.cli"],
}  # fmt: skip
NO_TORCH = ["quant.errors", "quant.extension", "quant.scheme", "quant.headers", "kernels.layout", "kernels.cpu.backend",
            "models.spec", "models.adaptable", "appliance", "appliance.adapters", "appliance.config", "appliance.core",
            "appliance.memory", "appliance.tui", "appliance.version", "appliance.bench", "appliance.doctor"]  # fmt: skip
NO_DIRECT_TORCH = ["appliance.server", "appliance.cli", "appliance.chat", "appliance.web"]
NO_EDGE = ["quant", "kernels", "models", "appliance.core", "appliance.memory", "appliance.runtime", "appliance.text",
           "appliance.llm", "appliance.config", "appliance.version"]  # fmt: skip
MAX_FILE, MAX_FUNCTION = 400, 80  # lines; what to aim for is 300 and 60


def inside(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str, *, lazy: bool) -> set[str]:
    """Dotted names that a module imports; with ``lazy`` also inside functions. What is for type checkers only does not count."""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in _import_nodes(tree(module), lazy=lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names}
    return found


def _import_nodes(node: ast.AST, *, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in ast.iter_child_nodes(node):
            yield from _import_nodes(child, lazy=lazy)


def reached(module: str) -> dict[str, str]:
    """All that importing ``module`` imports through modules of ours: name -> who imports it. A package's __init__ counts too."""
    found: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        pieces = name.split(".")
        parents = {".".join(pieces[:i]) for i in range(1, len(pieces))}
        for target in imports(name, lazy=False) | parents:
            if target not in found and target != name:
                found[target] = name
                if target in modules():
                    todo.append(target)
    return found


def listed(parts: list[str]) -> list[str]:
    """The modules of these parts; "appliance" means the package's own __init__.py only."""
    return [module for module in modules() if module in parts or any(inside(module, p) for p in parts if p != "appliance")]


@pytest.mark.parametrize("module", modules())
def test_imports_only_from_its_own_layer_or_below(module: str) -> None:
    part = max((part for part in MAY_IMPORT if inside(module, part)), key=len)
    if part == "appliance" and module != "appliance":
        pytest.fail(f"{module} belongs to no part: give it a line in MAY_IMPORT")
    allowed = [part, *MAY_IMPORT[part]]
    ours = {name for name in imports(module, lazy=True) if name.split(".")[0] in PACKAGES}
    upward = {name for name in ours if not any(inside(name, other) for other in allowed)}
    assert not upward, f"{module} imports {sorted(upward)}, but may import only {allowed}"


@pytest.mark.parametrize("module", listed(NO_TORCH))
def test_imports_no_torch_not_even_through_others(module: str) -> None:
    direct = {name for name in imports(module, lazy=True) if name.split(".")[0] in TORCH}
    assert not direct, f"{module} imports {sorted(direct)}"
    through = {name: by for name, by in reached(module).items() if name.split(".")[0] in TORCH}
    assert not through, f"{module} reaches torch: {through}"


@pytest.mark.parametrize("module", listed(NO_DIRECT_TORCH))
def test_leaves_torch_to_the_engine(module: str) -> None:
    direct = {name for name in imports(module, lazy=True) if name.split(".")[0] in TORCH}
    assert not direct, f"{module} imports {sorted(direct)}: tensors stay in the engine's process"


@pytest.mark.parametrize("module", listed(NO_EDGE))
def test_runs_without_the_libraries_of_the_edge(module: str) -> None:
    direct = {name for name in imports(module, lazy=True) if name.split(".")[0] in EDGE}
    assert not direct, f"{module} imports {sorted(direct)}"


BLOCKED_IMPORT = """
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is not installed")
blocked = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Block())
for module in sys.argv[2:]:
    importlib.import_module(module)
assert not blocked & set(sys.modules), blocked & set(sys.modules)
"""


WITHOUT_BOTH = [part for part in NO_TORCH if part not in ("appliance.tui", "appliance.bench")]


@pytest.mark.parametrize(("blocked", "parts"), [(TORCH | EDGE, WITHOUT_BOTH), (EDGE, NO_EDGE)], ids=["torch", "edge"])
def test_imports_where_these_are_not_installed(blocked: set[str], parts: list[str]) -> None:
    command = [sys.executable, "-c", BLOCKED_IMPORT, ",".join(sorted(blocked)), *listed(parts)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_package_files_stay_empty() -> None:
    packages = {name: path for name, path in modules().items() if path.name == "__init__.py" and name != "appliance"}
    full = [name for name, path in packages.items() if path.read_text().strip()]
    assert not full, f"__init__.py with content: {full}"


def test_transformers_imports_beside_our_package_called_kernels() -> None:
    """transformers probes for a package of that name; ours must not be taken for it."""
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.utils import is_kernels_available

    import kernels

    assert kernels.__file__ is not None and Path(kernels.__file__) == ROOT / "kernels" / "__init__.py"
    assert not is_kernels_available()


@pytest.mark.parametrize("module", modules())
def test_files_and_functions_can_be_read_in_one_go(module: str) -> None:
    lines = len(modules()[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{module} has {lines} lines: split it"
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: n for node in functions if (n := node.end_lineno - node.lineno + 1) > MAX_FUNCTION}  # type: ignore[operator]
    assert not long, f"{module} has functions of more than {MAX_FUNCTION} lines: {long}"
