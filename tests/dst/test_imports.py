"""The packages import only what they may, and importing them does nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDARD = frozenset(sys.stdlib_module_names)
ALLOWED = {"dst": {"torch", "numpy"}, "dst_models": {"torch"}}
LAZY = {"dst_models": {"triton"}}  # only inside functions
KNOWS_OPTIMIZERS = {"optimizer.py", "optimizer_state.py"}
WRITES_TO_PARAMETERS = {"sparsifier.py", "upkeep.py", "optimizer_state.py"}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no sources of {package} under {ROOT}"
    return found


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(node: ast.AST) -> list[str]:
    """Return the full names of the modules an import statement names; relative ones are the package's own."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield every imported name of a file and whether it is imported only inside a function."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for name in imported(node):
            yield name, lazy
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(tree(path), False)


def every_file(*packages: str) -> list[pytest.param]:
    return [
        pytest.param(package, path, id=str(path.relative_to(ROOT)))
        for package in packages
        for path in sources(package)
    ]


# --- Who may import whom -----------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "path"), every_file("dst", "dst_models"))
def test_a_library_imports_only_what_it_may(package: str, path: Path):
    for name, lazy in imports(path):
        top = name.split(".")[0]
        allowed = STANDARD | ALLOWED[package] | {package}
        if lazy:
            allowed |= LAZY.get(package, set())
        assert top in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_recipes_import_both():
    tops = {
        package: {name.split(".")[0] for path in sources(package) for name, _ in imports(path)}
        for package in ("dst", "dst_models", "recipes")
    }
    assert "dst_models" not in tops["dst"]
    assert "dst" not in tops["dst_models"]
    assert "recipes" not in tops["dst"] | tops["dst_models"]
    assert {"dst", "dst_models"} <= tops["recipes"]


@pytest.mark.parametrize(("package", "path"), every_file("dst", "dst_models"))
def test_relative_imports_stay_inside(package: str, path: Path):
    depth = len(path.relative_to(ROOT / package).parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= depth, f"{path}: an import leaves {package}"


# --- Who knows what ------------------------------------------------------------------------------------


def dotted(node: ast.AST) -> str:
    """Return "a.b.c" for an attribute chain of plain names, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def mentions(path: Path, module: str) -> bool:
    """Tell whether a file's code (not its docstrings) names a module."""
    nodes = list(ast.walk(tree(path)))
    names = [name for node in nodes for name in imported(node)] + [dotted(node) for node in nodes]
    return any(f"{name}.".startswith(f"{module}.") for name in names)


def test_only_the_wrapper_knows_torchs_optimizers():
    knowing = {path.name for path in sources("dst") if mentions(path, "torch.optim")}
    assert knowing == KNOWS_OPTIMIZERS
    assert not [path for path in sources("dst_models") if mentions(path, "torch.optim")]


@pytest.mark.parametrize("module", ["random", "numpy.random", "time", "datetime", "torch.distributed"])
@pytest.mark.parametrize("name", ["masks", "schedules", "scores", "distribution", "algorithms", "upkeep"])
def test_the_pure_modules_know_no_clock_chance_or_ranks(name: str, module: str):
    assert not mentions(ROOT / "dst" / f"{name}.py", module)


PURE_RANDOM = {"rand", "randn", "randint", "randperm", "manual_seed", "rand_like", "randn_like", "bernoulli"}
INSTANCE_RANDOM = {"bernoulli_", "normal_", "uniform_", "random_", "exponential_", "multinomial"}


@pytest.mark.parametrize(("package", "path"), every_file("dst"))
def test_the_core_draws_from_no_generator(package: str, path: Path):
    called = {
        node.func.attr
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not called & (PURE_RANDOM | INSTANCE_RANDOM)


# --- Who writes --------------------------------------------------------------------------------------------


def writes_in_place(path: Path) -> set[str]:
    """Return the in-place tensor methods (a trailing underscore) and .data assignments of a file.

    A simple check: it sees `x.add_(...)`, `x.data = ...` and `x.grad = ...`, not every way to write.
    """
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            attribute = node.func.attr
            if attribute.endswith("_") and not attribute.startswith("_"):
                target = dotted(node.func.value)
                if "param" in target or "weight" in target:
                    found.add(f"{target}.{attribute}")
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                inner = target.value if isinstance(target, ast.Subscript) else target
                if isinstance(inner, ast.Attribute) and inner.attr == "data":
                    found.add(dotted(inner) or "data")
                if isinstance(target, ast.Subscript) and dotted(inner) in {"parameter", "param", "weight"}:
                    found.add(dotted(inner))
    return found


@pytest.mark.parametrize(("package", "path"), every_file("dst"))
def test_only_the_engine_writes_to_parameters(package: str, path: Path):
    if path.name not in WRITES_TO_PARAMETERS:
        assert writes_in_place(path) == set()


def test_the_writing_check_sees_a_write():
    assert writes_in_place(ROOT / "dst" / "sparsifier.py")


@pytest.mark.parametrize(("package", "path"), every_file("dst", "dst_models"))
def test_no_print_in_the_libraries(package: str, path: Path):
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.Call) and dotted(node.func) in {"print", "logging.basicConfig"})


# --- Importing does nothing -----------------------------------------------------------------------------

PROBE = """
import random, sys, warnings
import numpy, torch
def state():
    return (
        torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), sys.getrecursionlimit(), warnings.filters[:],
        torch.cuda.is_initialized(), torch.distributed.is_initialized(),
    )
before, loaded = state(), set(sys.modules)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    inside = warnings.filters[:]
    import {package}
    assert warnings.filters == inside, "importing changes the warning filters"
assert not caught, [str(w.message) for w in caught]
assert state() == before, "importing changes a global state"
new = {{name.split(".")[0] for name in set(sys.modules) - loaded}}
assert not new & {forbidden}, new & {forbidden}
import logging
assert not logging.getLogger("{package}").handlers
"""


@pytest.mark.parametrize("package", ["dst", "dst_models"])
def test_importing_has_no_side_effect(package: str):
    other = {"dst": "dst_models", "dst_models": "dst"}[package]
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(package=package, forbidden={other, "recipes", "PIL"})],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
