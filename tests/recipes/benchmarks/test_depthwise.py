from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.benchmarks import depthwise
from recipes.benchmarks.depthwise import SHAPES, Shape


def test_the_twelve_shapes_of_slak_tiny() -> None:
    expected = {
        (channels, side, *kernel)
        for channels, side, long in [(124, 56, 51), (249, 28, 49), (499, 14, 47), (998, 7, 13)]
        for kernel in [(long, 5), (5, long), (5, 5)]
    }
    assert {(s.channels, s.side, s.height, s.width) for s in SHAPES["slak"]} == expected


def test_a_small_run_prints_and_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "slak", (Shape(3, 5, 7, 3), Shape(2, 4, 3, 3, batch=3)))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    output = tmp_path / "depthwise.json"
    result = depthwise.main(["--output", str(output), "--rounds", "3", "--batch", "2"])
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    rows = result["groups"]["slak"]["rows"]
    assert [row["shape"] for row in rows] == ["3, 5, 7x3", "3 x 2, 4, 3x3"]
    assert all(row["ratio"] in (row["ratio_nchw"], row["ratio_channels_last"]) for row in rows)
    product = rows[0]["ratio"] * rows[1]["ratio"]
    assert result["groups"]["slak"]["geometric_mean"]["ratio"] == pytest.approx(product**0.5)
    printed = capsys.readouterr().out
    assert "3, 5, 7x3" in printed
    assert "geometric mean" in printed
