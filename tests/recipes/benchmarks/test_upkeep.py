from __future__ import annotations

import pytest
import torch

from recipes.benchmarks import upkeep


def test_prints_both_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert upkeep.main(["--rounds", "1", "--model", "slak_micro"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["keep at zero", "one update"]


def test_both_procedures_do_the_same_work() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(50, 40, generator=generator) < 0.6
    weight = torch.randn(50, 40, generator=generator) * mask
    count = int(mask.sum())
    exact = upkeep.update({"w": weight}, {"w": mask})["w"]
    published = upkeep.published_update({"w": weight}, {"w": mask.float()})["w"]
    assert int(exact.sum()) == int(published.sum()) == count
    one, other = {"w": weight + 1}, {"w": weight + 1}
    upkeep.masking(one, {"w": mask})
    upkeep.published_masking(other, {"w": mask.float()})
    assert torch.equal(one["w"], other["w"])
