"""The package as people install and import it: the public names, what a bare import costs, what a wheel holds."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import adapter_hub

ROOT = Path(__file__).parents[1]
MODELS = ("torch", "transformers", "peft", "sentence_transformers", "faiss", "sklearn")
HEAVY = ("torch", "transformers", "sentence_transformers", "faiss", "sqlalchemy", "pyarrow", "sklearn", "numpy")


@pytest.mark.parametrize("name", adapter_hub.__all__)
def test_every_public_name_resolves_to_something_documented_and_is_kept(name: str) -> None:
    value = getattr(adapter_hub, name)
    assert vars(adapter_hub)[name] is value
    assert isinstance(value, str) or value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Hubb'"):
        _ = adapter_hub.Hubb


def test_dir_shows_the_public_names_before_they_are_imported() -> None:
    code = "import adapter_hub; assert set(adapter_hub.__all__) <= set(dir(adapter_hub))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_the_package_its_errors_and_refs_imports_no_heavy_library() -> None:
    light = "adapter_hub, adapter_hub.errors, adapter_hub.refs, adapter_hub.examples"
    code = f"import sys, {light}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_verbs_that_look_and_move_import_no_library_of_models(tmp_path: Path) -> None:
    """Previously each verb took the seconds that torch, transformers, PEFT and scikit-learn take to be imported."""
    code = f"""
import sys
from adapter_hub.cli import app
from adapter_hub.hub import Hub
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.manifest import VersionFacts
from adapter_hub.registry.registry import Registry

registry = ["--registry", {str(tmp_path / "registry")!r}]
with Registry.create(registry[1], config=RegistryConfig(base_model="tiny", encoder="hash", max_tokens=64)) as made:
    for word in (b"1", b"2", b"3"):
        made.add("banking", VersionFacts(base_model="tiny", base_fingerprint="f", peft={{}}), {{"adapter_config.json": word}})
verbs = ("list", "list --task-type seq_cls", "show banking", "history banking", "rollback banking", "promote banking@3",
         "alias banking staging 1", "retire banking@3", "gc")
for verb in verbs:
    try:
        app([*verb.split(), *registry], prog_name="adapter-hub")
    except SystemExit as done:
        assert not done.code, (verb, done.code)
with Hub.open(registry[1]) as hub:
    assert hub.registry.verify().ok and "banking@1" in hub and len(hub) == 1
print([m for m in {(*MODELS,)} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_clone_that_was_moved_sets_up_its_environment_again(tmp_path: Path) -> None:
    """Previously `make demo` and the installed command spoke of the folder that it had been in."""
    for file in ("Makefile", "constraints.txt", "pyproject.toml"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    (tmp_path / ".venv").mkdir()
    for place, again in ((tmp_path, False), (tmp_path.parent / "before", True)):
        for stamp in (".base", ".demo"):
            (tmp_path / ".venv" / stamp).write_text(f"{place}\n")
        done = subprocess.run(["make", "-n", "demo"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ("-m venv" in done.stdout, ".[minilm]" in done.stdout) == (again, again)


def test_every_dependency_and_extra_is_held_by_one_exact_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if line.count("==") != 1 or "+" in line or "/" in line] == []
    held = {_canonical(line.split("==")[0]) for line in lines}
    wanted = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    assert {_canonical(line) for line in wanted} - held == set()


def _canonical(requirement: str) -> str:
    name = requirement
    for mark in "[=<>!~; ":
        name = name.split(mark)[0]
    return name.lower().replace("_", "-")


def test_a_wheel_built_from_the_checkout_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    # A copy is built, so that no build folder is left in the checkout and a stale one is not picked up.
    source = tmp_path / "source"
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "adapter_hub").rglob("*.py")} | {"adapter_hub/py.typed"}
    for file in [*wanted, "pyproject.toml", "README.md", "LICENSE"]:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("adapter_hub-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "adapter-hub = adapter_hub.cli:main" in entry_points
    assert f"Version: {adapter_hub.__version__}" in metadata and "License-Expression: Apache-2.0" in metadata
