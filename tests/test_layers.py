"""A module imports only from rows below it and from its own folder. The table is the project's design."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "adapter_hub"
ROWS = {
    "errors": 0, "refs": 0, "examples": 0, "chat": 0,
    "precision": 1, "base_model": 1, "adapters": 1,
    "registry": 2,
    "routing": 3, "training": 3, "engine": 3,
    "continual": 4, "batch": 4, "testing": 4, "arguments": 4, "prediction": 4,
    "hub": 5, "answering": 5, "feedback": 5, "registering": 5, "learning": 5, "evaluation": 5,
    "proposals": 5, "lifelong": 5, "survey": 5, "merging": 5,
    "cli": 6, "server": 6,
    "__main__": 7,
}
# The hub's work, in files of their own: functions that are given a hub.
HUBS_WORK = ("answering", "feedback", "registering", "learning", "evaluation", "proposals", "lifelong", "survey", "merging")
# Who may know whom on its own row; everyone else there is a stranger.
NEIGHBOURS = {("refs", "errors"), ("examples", "errors"), ("chat", "errors"), ("chat", "examples")} | {
    ("adapters", "base_model"), ("adapters", "precision"), ("base_model", "precision"),
} | {
    ("evaluation", "answering"), ("proposals", "answering"), ("survey", "lifelong"), ("learning", "registering"), ("merging", "learning"),
} | {pair for one in HUBS_WORK for pair in (("hub", one), (one, "hub"))}
HEAVY = {"torch", "transformers", "peft", "faiss", "sentence_transformers", "sqlalchemy", "pyarrow", "sklearn", "numpy"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def room(module: str) -> str:
    """`adapter_hub.engine.plan` -> `engine`"""
    return module.split(".")[1]


def imports(path: Path, *, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in ROWS, f"{own} has no row in the table"
    for module in imports(path):
        if module.split(".")[0] != "adapter_hub":
            continue
        assert module != "adapter_hub", f"{path}: import the module that owns the name, not the package"
        other = room(module)
        below = ROWS[other] < ROWS[own]
        assert other == own or below or (own, other) in NEIGHBOURS, f"{path}: {own} (row {ROWS[own]}) imports {other} (row {ROWS[other]})"


@pytest.mark.parametrize("name", HUBS_WORK)
def test_the_hubs_work_knows_the_hub_by_its_type_alone(name: str) -> None:
    """What it imports when it runs would be a circle."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    guarded = {id(node) for one in ast.walk(tree) if isinstance(one, ast.If) and "TYPE_CHECKING" in ast.unparse(one.test) for node in ast.walk(one)}
    of_hub = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "adapter_hub.hub"]
    assert of_hub and all(id(node) in guarded for node in of_hub)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row == 0])
def test_row_0_is_standard_library_only_but_for_parquet_inside_functions(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    plain = {*sys.stdlib_module_names, "adapter_hub"}
    assert {module.split(".")[0] for module in imports(path, top_level_only=True)} <= plain
    assert {module.split(".")[0] for module in imports(path)} <= plain | ({"pyarrow"} if name == "examples" else set())


def test_the_cli_imports_nothing_heavy_before_a_verb_runs() -> None:
    for path in (PACKAGE / "cli").glob("*.py"):
        assert not {module.split(".")[0] for module in imports(path, top_level_only=True)} & HEAVY


def test_the_registry_knows_no_tensors() -> None:
    for path in (PACKAGE / "registry").glob("*.py"):
        assert not {module.split(".")[0] for module in imports(path)} & (HEAVY - {"sqlalchemy"})


def test_models_are_never_unpickled_and_remote_code_is_never_trusted() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text and "import pickle" not in text and "trust_remote_code=True" not in text, path
