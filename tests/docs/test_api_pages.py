"""Every public name has a docstring and a place in the API pages, and every page's code runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import dst
import dst_models

ROOT = Path(__file__).resolve().parents[2]


def public_names(package: ModuleType) -> list[str]:
    """Names that a package offers: its __all__, or all but submodules and what starts with an underscore."""
    return getattr(package, "__all__", None) or [
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]


@pytest.mark.parametrize("package", [dst, dst_models], ids=lambda package: package.__name__)
def test_every_public_name_is_documented(package: ModuleType) -> None:
    page = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text()
    listed = re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)
    assert listed, "no names are listed"
    assert sorted(listed) == sorted(f"{package.__name__}.{name}" for name in public_names(package))
    for name in public_names(package):
        assert inspect.getdoc(getattr(package, name)), name


def python_blocks(path: Path) -> str:
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE))


PAGES = ["README.md", "docs/quickstart.md", "docs/guides/add-an-algorithm.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = python_blocks(ROOT / page)
    assert code, f"{page} holds no code"
    # One namespace a page, as for a reader who pastes block after block.
    exec(compile(code, page, "exec", dont_inherit=True), {"__name__": "page"})
    capsys.readouterr()


def test_the_algorithms_of_the_guide_train() -> None:
    import torch

    namespace: dict[str, object] = {"__name__": "page"}
    code = python_blocks(ROOT / "docs/guides/add-an-algorithm.md")
    exec(compile(code, "guide", "exec", dont_inherit=True), namespace)
    for algorithm in (
        namespace["gradient_set"](total_steps=40),  # type: ignore[operator]
        namespace["algorithm"],
        namespace["GlobalMagnitude"](due=dst.Every(5)),  # type: ignore[operator]
    ):
        model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        optimizer = dst.SparseOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, sparsity=0.5, algorithm=algorithm
        )
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(4, 12)).square().sum().backward()
            optimizer.step()
        assert sum(optimizer.sparsifier.counts.values()) == 64
