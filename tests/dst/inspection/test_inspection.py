"""`python -m dst inspect` and `diff`: right counts on every kind of file, one line on every wrong one."""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import nn

import dst
from dst.__main__ import main
from dst.inspection.png import png

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., Any]


class Net(nn.Module):
    """Two sparse layers, a dense norm, and a buffer that holds zeros."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, classes)
        self.register_buffer("causal", torch.ones(2, 2).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).flatten(1))


def not_a_model() -> int:
    return 3


def broken() -> nn.Module:
    raise RuntimeError("no such\nsize")


def trained(steps: int = 6, seed: int = 0, sparsity: float = 0.75) -> tuple[Net, dst.SparseOptimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = dst.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        sparsity=sparsity,
        algorithm=dst.set_(total_steps=100, interval=2),
        seed=seed,
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


MODEL, OPTIMIZER = trained()
CHECKPOINT = {"model": MODEL.state_dict(), "optimizer": OPTIMIZER.state_dict(), "step": 6}
ZEROS = {name: mask * 1.5 for name, mask in OPTIMIZER.masks.items()}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with --json and return what it says; any line on standard error fails."""

    def running(*arguments: object) -> Any:
        status = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return json.loads(out)

    return running


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail, and return its one line on standard error."""

    def running(*arguments: object) -> str:
        status = main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err

    return running


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_counts(found: Any, optimizer: dst.SparseOptimizer) -> None:
    """Compare with a count of the masks themselves."""
    assert [row["name"] for row in found["tensors"]] == list(optimizer.masks)
    for row, mask in zip(found["tensors"], optimizer.masks.values(), strict=True):
        active = sum(mask.flatten().tolist())
        assert (row["active"], row["size"], row["shape"]) == (active, mask.numel(), list(mask.shape))
        assert row["sparsity"] == (mask.numel() - active) / mask.numel()
        assert row["share"] == active / found["active"]
    assert found["active"] == sum(row["active"] for row in found["tensors"])
    assert found["size"] == sum(row["size"] for row in found["tensors"])
    assert found["sparsity"] == (found["size"] - found["active"]) / found["size"]


# --- What is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "content",
    [
        CHECKPOINT,
        {"epoch": 3, "state_dict": MODEL.state_dict(), "optimizer_states": [OPTIMIZER.state_dict()]},
        OPTIMIZER.state_dict(),
        OPTIMIZER.sparsifier.state_dict(),
    ],
    ids=["whole", "nested", "optimizer", "sparsifier"],
)
def test_a_saved_sparse_state_is_told_wherever_it_lies(
    content: Any, new_format: bool, tmp_path: Path, run: Run
) -> None:
    file = saved(tmp_path / "a.pt", content, _use_new_zipfile_serialization=new_format)
    found = run("inspect", file)
    assert_counts(found, OPTIMIZER)
    engine = OPTIMIZER.sparsifier
    assert (found["step"], found["updates"], found["seed"]) == (engine.step, engine.updates, engine.seed)
    assert found["algorithm"] == repr(engine.algorithm)
    assert found["exploration_rate"] == dst.exploration_rate(OPTIMIZER)
    assert found["masks_from"] == "saved masks"
    assert found["stray"] == (0 if "model" in content or "state_dict" in content else None)


def test_a_checkpoint_of_the_recipes(tmp_path: Path, run: Run) -> None:
    from recipes.engine.checkpoint import save
    from recipes.engine.state import State

    ema = dst.SparseEMA(MODEL, OPTIMIZER)
    scheduler = torch.optim.lr_scheduler.ConstantLR(OPTIMIZER)
    save(State(MODEL, OPTIMIZER, scheduler, ema).state_dict(), tmp_path / "step.pt")
    found = run("inspect", tmp_path / "step.pt")
    assert_counts(found, OPTIMIZER)
    assert found["stray"] == 0
    average = run("inspect", tmp_path / "step.pt", "--entry", "ema")
    assert average["masks_from"] == "zeros"


def test_weights_outside_the_masks_are_counted(tmp_path: Path, run: Run) -> None:
    weights = {name: value.clone() for name, value in MODEL.state_dict().items()}
    outside = (~OPTIMIZER.masks["head.weight"]).nonzero()[:3]
    for at in outside.tolist():
        weights["head.weight"][tuple(at)] = 1.0
    file = saved(tmp_path / "a.pt", {"model": weights, "optimizer": OPTIMIZER.state_dict()})
    assert run("inspect", file)["stray"] == 3


WRAPPINGS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 3, "lr": torch.tensor(0.1)},
    "state_dict": lambda weights: {"state_dict": weights},
    "model_ema": lambda weights: {"model_ema": weights},
    "two deep": lambda weights: {"ema": {"module": weights}},
    "ddp": lambda weights: {"model": {f"module.{name}": value for name, value in weights.items()}},
    "compiled": lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
    "half": lambda weights: {name: value.bfloat16() for name, value in weights.items()},
    "fp8": lambda weights: {name: value.to(torch.float8_e4m3fn) for name, value in weights.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_zeros_are_told_under_the_usual_wrappers(wrapping: str, tmp_path: Path, run: Run) -> None:
    others = {"norm.weight": torch.zeros(4), "causal": torch.ones(2, 2, dtype=torch.int64), 7: torch.zeros(2)}
    content = WRAPPINGS[wrapping](dict(ZEROS))
    found = run("inspect", saved(tmp_path / "a.pt", content | others if wrapping == "bare" else content))
    assert_counts(found, OPTIMIZER)
    assert found["masks_from"] == "zeros"
    assert {found[key] for key in ("step", "updates", "seed", "algorithm", "exploration_rate")} == {None}


@pytest.mark.parametrize("name", ["a.safetensors", "renamed.bin"])
def test_safetensors(name: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / name).write_bytes(safetensors_bytes(ZEROS))
    found = run("inspect", tmp_path / name)
    assert {row["name"]: row["active"] for row in found["tensors"]} == OPTIMIZER.sparsifier.counts


def test_an_entry_is_chosen(tmp_path: Path, run: Run) -> None:
    _, other = trained(seed=1, steps=2)
    file = saved(tmp_path / "a.pt", {"both": [OPTIMIZER.state_dict(), other.state_dict()]})
    assert run("inspect", file, "--entry", "both.1")["step"] == 2
    assert run("inspect", file, "--entry", "both.0")["step"] == 6


# --- With a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [[], ["--meta"]], ids=["cpu", "meta"])
@pytest.mark.parametrize("content", [CHECKPOINT, MODEL.state_dict()], ids=["masks", "zeros"])
def test_macs_are_those_of_count(
    meta: list[str], content: Any, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "user_models", sys.modules[__name__])
    file = saved(tmp_path / "a.pt", content)
    found = run("inspect", file, "--model", "user_models:Net", "--input-size", 3, 4, 4, *meta)
    masks = OPTIMIZER.masks if content is CHECKPOINT else dst.masks_from_weights(weights_of_the_model())
    counts = dst.count(Net(), (3, 4, 4), masks)
    for key in ("nonzero", "macs", "sparse_macs"):
        assert found[key] == getattr(counts, key)
    assert found["parameters"] == counts.params
    by_name = {row["name"]: row["sparse_macs"] for row in found["tensors"]}
    assert by_name == {f"{row.name}.weight": row.sparse_macs for row in counts.rows if row.macs}


def weights_of_the_model() -> dict[str, torch.Tensor]:
    return {name: value for name, value in MODEL.state_dict().items() if name != "causal"}


def test_a_model_is_built_with_literal_arguments(tmp_path: Path, run: Run) -> None:
    file = saved(tmp_path / "a.pt", {"weight": torch.tensor([[0.0, 1.0, 2.0]])})
    found = run("inspect", file, "--model", "torch.nn:Linear(3, out_features=1)", "--input-size", 3)
    assert (found["macs"], found["sparse_macs"], found["parameters"]) == (3, 2, 4)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("Net", "expected package.module:callable"),
        ("torch.nn:", "expected package.module:callable"),
        ("torch.nn:Linear(__import__('os'))", "expected package.module:callable"),
        ("torch.nn:Linear(*[1])", "expected package.module:callable"),
        ("torch.nn:Linear(**{})", "expected package.module:callable"),
        ("not.here:model", "No module named 'not'"),
        ("torch.nn:Liner(3, 1)", "has no attribute 'Liner'"),
        ("torch.nn:Linear(3)", "TypeError"),
        ("user_models:broken", "no such size"),
        ("user_models:not_a_model", "made a int"),
        ("torch.nn:Linear(4, 3)", "names no parameter"),
        ("user_models:Net(9)", "mask 'head.weight' must be bool of shape (9, 64)"),
    ],
)
def test_a_model_that_does_not_fit(
    spec: str,
    words: str,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "user_models", sys.modules[__name__])
    file = saved(tmp_path / "a.pt", CHECKPOINT)
    assert words in refused("inspect", file, "--model", spec, "--input-size", 3, 4, 4)


def test_a_model_whose_only_zeros_are_in_a_buffer(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "user_models", sys.modules[__name__])
    file = saved(tmp_path / "a.pt", {"causal": MODEL.causal})
    assert "only buffers" in refused("inspect", file, "--model", "user_models:Net", "--input-size", 3, 4, 4)


# --- Pictures ---------------------------------------------------------------------------------------------


def decoded(data: bytes) -> list[list[int]]:
    """Read an 8-bit grey PNG without filters; every checksum must fit."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + content)
        chunks.append((kind, content))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 0, 0, 0, 0]
    raw = zlib.decompress(chunks[1][1])
    assert len(raw) == height * (width + 1)
    rows = [raw[row * (width + 1) : (row + 1) * (width + 1)] for row in range(height)]
    assert all(row[0] == 0 for row in rows)
    return [list(row[1:]) for row in rows]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_picture_keeps_its_levels(height: int, width: int, seed: int) -> None:
    levels = torch.randint(0, 256, (height, width), generator=torch.Generator().manual_seed(seed))
    assert decoded(png(levels[None] / 255)) == levels.tolist()


def test_grey_is_rounded() -> None:
    assert decoded(png(torch.full((1, 1, 1), 0.5))) == [[128]]


def test_the_pictures_are_those_of_the_masks(tmp_path: Path, run: Run) -> None:
    file = saved(tmp_path / "a.pt", CHECKPOINT)
    run("inspect", file, "--images", tmp_path / "new" / "all")
    assert len(list((tmp_path / "new" / "all").iterdir())) == len(OPTIMIZER.masks)
    run("inspect", file, "--images", tmp_path / "one", "--select", "head*")
    (picture,) = (tmp_path / "one").iterdir()
    assert picture.name == "head.weight.png"
    mask = OPTIMIZER.masks["head.weight"]
    pixels = torch.tensor(decoded(picture.read_bytes()))
    factor = 512 // mask.shape[1]
    assert torch.equal(pixels[::factor, ::factor], mask * 255)
    assert pixels.shape == (mask.shape[0] * factor, mask.shape[1] * factor)


def test_the_names_of_a_file_do_not_lead_out_of_the_folder(tmp_path: Path, run: Run) -> None:
    names = ["../../out", "/tmp/out", "a/b", "a_b", "..", "a\nb", "\ud800"]
    file = saved(tmp_path / "a.pt", {name: torch.eye(2) * (at + 1) for at, name in enumerate(names)})
    run("inspect", file, "--images", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").iterdir())) == len(names)
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "pictures"}


def test_a_name_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "a.pt", {"evil\x1b[2J\r\n\ud800": torch.eye(2)})
    assert main(["inspect", str(file)]) == 0
    assert "evil?[2J???" in capsys.readouterr().out


def test_a_terminal_without_the_letters_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="ascii"))
    assert main(["inspect", str(saved(tmp_path / "a.pt", {"\u00e9": torch.eye(2)}))]) == 0
    assert b"\\xe9" in stream.getvalue()


# --- Difference -------------------------------------------------------------------------------------------


def test_the_difference_is_that_of_sets(tmp_path: Path, run: Run) -> None:
    _, later = trained(steps=14, sparsity=0.5)
    files = [saved(tmp_path / f"{n}.pt", o.state_dict()) for n, o in enumerate([OPTIMIZER, later])]
    found = run("diff", *files)
    assert found["steps"] == [6, 14]
    assert found["files"] == list(map(str, files))
    everywhere = [set(), set()]
    for row in found["tensors"]:
        a, b = (
            {(row["name"], at) for at, on in enumerate(optimizer.masks[row["name"]].flatten().tolist()) if on}
            for optimizer in (OPTIMIZER, later)
        )
        everywhere[0] |= a
        everywhere[1] |= b
        assert_difference(row, a, b)
    assert_difference(found["total"], *everywhere)
    assert found["total"]["grown"] > 0


def assert_difference(row: Any, a: set[Any], b: set[Any]) -> None:
    assert (row["before"], row["after"], row["kept"]) == (len(a), len(b), len(a & b))
    assert (row["grown"], row["dropped"]) == (len(b - a), len(a - b))
    assert row["overlap"] == len(a & b) / len(a | b)
    assert row["churn"] == len(b - a) / len(b)


def test_a_file_is_equal_to_itself_and_to_its_zeros(tmp_path: Path, run: Run) -> None:
    a = saved(tmp_path / "a.pt", OPTIMIZER.state_dict())
    b = saved(tmp_path / "b.pt", ZEROS)
    for other in (a, b):
        total = run("diff", a, other)["total"]
        assert (total["overlap"], total["churn"], total["grown"]) == (1.0, 0.0, 0)


def test_the_two_must_hold_the_same_tensors(tmp_path: Path, refused: Callable[..., str]) -> None:
    a = saved(tmp_path / "a.pt", ZEROS)
    other = saved(tmp_path / "b.pt", {"body.weight": torch.eye(3)})
    assert "'conv.weight' is 4x3x3x3 in the first and absent in the second (3 of 3" in refused(
        "diff", a, other
    )
    shape = saved(tmp_path / "c.pt", ZEROS | {"head.weight": torch.eye(3)})
    assert "'head.weight' is 5x64 in the first and 3x3 in the second (1 of 2" in refused("diff", a, shape)


# --- What is refused --------------------------------------------------------------------------------------


class Code:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_no_pickle_is_run(new_format: bool, tmp_path: Path, refused: Callable[..., str]) -> None:
    content = {**ZEROS, "more": Code(tmp_path / "run")}
    file = saved(tmp_path / "a.pt", content, _use_new_zipfile_serialization=new_format)
    assert "needs pickle, which can run any code, for posix.mkdir; nothing was run" in refused(
        "inspect", file
    )
    assert not (tmp_path / "run").exists()


def damaged(change: str) -> dict[str, Any]:
    state = OPTIMIZER.state_dict()
    sparse = state["sparse"]
    if change == "mask":
        sparse["masks"]["head.weight"] = sparse["masks"]["head.weight"][:-1]
    elif change == "missing":
        del sparse["explored"]["head.weight"]
    elif change == "shape":
        sparse["shapes"]["head.weight"] = [2**62, 2**62, -1]
    elif change == "huge":
        sparse["shapes"]["head.weight"] = [10**30]
    elif change == "none":
        sparse["shapes"] = {}
    elif change == "kind":
        sparse["masks"] = 3
    else:
        sparse["step"] = "six"
    return state


@pytest.mark.parametrize("change", ["mask", "missing", "shape", "huge", "none", "kind", "step"])
def test_a_damaged_state_is_refused(change: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "the sparse state is damaged" in refused("inspect", saved(tmp_path / "a.pt", damaged(change)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Net().state_dict() | {"causal": torch.ones(2)}, "is dense: none of the 428 weights in 2 tensors"),
        ({"epoch": 3, "weights": {"a": 1}}, "holds no floating-point tensor of two or more dimensions"),
        ({}, "its entries are none"),
        ({"a": torch.zeros(3)}, "holds no floating-point tensor of two or more dimensions"),
        (torch.zeros(2, 2), "holds a Tensor, expected a dict"),
        ([torch.zeros(2, 2)], "holds a list, expected a dict"),
        ({"model": Net().state_dict(), "args": argparse.Namespace(lr=1)}, "for argparse.Namespace"),
        (
            {"a": OPTIMIZER.state_dict(), "b": OPTIMIZER.state_dict()},
            "holds 2 sparse states (a.sparse, b.sparse)",
        ),
    ],
)
def test_a_file_without_masks_is_refused(
    content: Any, words: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = saved(tmp_path / "a.pt", content)
    assert words in refused("inspect", file)
    assert words in refused("diff", file, file)


def test_a_file_that_cannot_be_read(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "there is no such file" in refused("inspect", tmp_path / "a.pt")
    assert "is a folder" in refused("inspect", tmp_path)
    assert "cannot be read" in refused("inspect", "a\0.pt")
    for content in (b"", b"hello", b"PK\x03\x04", b'{"a": {"b": 1}}'):
        (tmp_path / "b.pt").write_bytes(content)
        assert "damaged" in refused("inspect", tmp_path / "b.pt")
    (tmp_path / "b.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nothing!")
    assert "damaged or no safetensors file" in refused("inspect", tmp_path / "b.safetensors")


def test_a_changed_weight_is_found_by_its_checksum(tmp_path: Path, refused: Callable[..., str]) -> None:
    data = bytearray(written(ZEROS, True))
    at = data.index(struct.pack("<f", 1.5))
    data[at] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    assert "fails its checksum" in refused("inspect", tmp_path / "a.pt")


def test_a_torchscript_archive_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/version", b"3\n")
    assert "TorchScript" in refused("inspect", tmp_path / "a.pt")


def test_safetensors_is_optional(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(ZEROS))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refused("inspect", tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: command"),
        (["explain", "FILE"], "invalid choice: 'explain'"),
        (["inspect"], "required: file"),
        (["diff", "FILE"], "required: other"),
        (["inspect", "FILE", "--input-size", "x"], "invalid int value: 'x'"),
        (["inspect", "FILE", "--model", "a:b"], "--model and --input-size go together"),
        (["inspect", "FILE", "--input-size", "3"], "--model and --input-size go together"),
        (["inspect", "FILE", "--meta"], "give --model too"),
        (["inspect", "FILE", "--select", "*"], "give --images too"),
        (["inspect", "FILE", "--images", "FILE"], "cannot write the pictures"),
        (["inspect", "FILE", "--images", "FOLDER", "--select", "haed*"], "near names: 'head.weight'"),
        (
            ["inspect", "FILE", "--entry", "modle"],
            "has no entry 'modle'; its entries are 'model', 'optimizer'",
        ),
        (["inspect", "FILE", "--entry", "optimizer.param_groups.7"], "has no entry"),
        (["inspect", "FILE", "--entry", "step"], "the entry 'step' is a int"),
    ],
)
def test_a_wrong_command(
    arguments: Sequence[str], words: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    names = {"FILE": str(saved(tmp_path / "a.pt", CHECKPOINT)), "FOLDER": str(tmp_path / "pictures")}
    assert words in refused(*(names.get(argument, argument) for argument in arguments))


# --- Bad bytes ----------------------------------------------------------------------------------------------


def written(content: Any, new_format: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=new_format)
    return stream.getvalue()


FILES = {
    "zip": written(CHECKPOINT, True),
    "legacy": written(ZEROS, False),
    "safetensors": safetensors_bytes(ZEROS),
}


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[str, bytes]:
    """Cut a file short, or change some of its bytes, those at its ends more often."""
    kind = draw(st.sampled_from(sorted(FILES)))
    data = bytearray(FILES[kind])
    if draw(st.booleans()):
        return kind, bytes(data[: draw(st.integers(0, len(data) - 1))])
    place = (
        st.integers(0, len(data) - 1) | st.integers(0, 300) | st.integers(1, 600).map(lambda n: len(data) - n)
    )
    for at, value in draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=8)):
        data[at] = value
    return kind, bytes(data)


@settings(max_examples=400)
@given(spoilt())
def test_a_spoilt_file_is_told_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes]
) -> None:
    """Bytes that no checksum covers, in old files and safetensors, may change what is told."""
    kind, data = file
    path = tmp_path_factory.getbasetemp() / "spoilt"
    path.write_bytes(data)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        status = main(["inspect", str(path), "--json"])
    if status == 0:
        assert err.getvalue() == ""
        found = json.loads(out.getvalue())
        assert found["size"] > 0
        if kind == "zip":  # checksums cover every record
            assert_counts(found, OPTIMIZER)
    else:
        assert (status, out.getvalue()) == (2, "")
        assert err.getvalue().startswith("error: ")
        assert err.getvalue().count("\n") == 1


# --- From the outside ---------------------------------------------------------------------------------------


def as_a_user(folder: Path, *arguments: str) -> tuple[int, str, str]:
    (folder / "my_models.py").write_text(
        "import torch\ndef build(width):\n    return torch.nn.Linear(width, 2)\n"
    )
    saved(folder / "a.pt", {"weight": torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])})
    done = subprocess.run(
        [sys.executable, "-m", "dst", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_as_a_user_runs_it(tmp_path: Path) -> None:
    command = ["inspect", "a.pt", "--model", "my_models:build(3)", "--input-size", "3"]
    assert as_a_user(tmp_path, *command) == (0, TABLE, "")


def test_a_log_message_is_no_second_line(tmp_path: Path) -> None:
    """The model fails on the meta device first, which `dst.count` logs."""
    command = ["inspect", "a.pt", "--model", "my_models:build(3)", "--input-size", "4"]
    status, out, err = as_a_user(tmp_path, *command)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: the model of --model cannot be counted on an input of 4: ")


TABLE = """\
tensor  shape  sparsity  active  weights  of active  sparse MACs
----------------------------------------------------------------
weight  2x3      0.5000       3        6   100.00 %            3
----------------------------------------------------------------
total            0.5000       3        6   100.00 %            3

masks              read off the zeros of the weights; tensors of two or more dimensions
parameters         5 of 8 non-zero
MACs per sample    3 of 6 with active weights
"""
