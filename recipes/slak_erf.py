"""Measure effective receptive fields: how far from its middle pixel a network looks.

python recipes/slak_erf.py                                          random weights, noise, no data needed
python recipes/slak_erf.py --data PATH --checkpoint slak_tiny=FILE  a folder of images, trained weights
python recipes/slak_erf.py --images 50 ...                          as many images as the published code
python recipes/slak_erf.py --models slak_tiny torchvision.models:resnet50

Source of the measure: Ding et al., "Scaling Up Your Kernels to 31x31" (RepLKNet), arXiv:2203.06717, and Liu
et al., "More ConvNets in the 2020s" (SLaK), arXiv:2207.03620.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

if __package__ in (None, ""):  # run as a script: its own folder is on the path, the source tree is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dst_models import effective_receptive_field
from recipes.data import DataError
from recipes.engine.build import choose_device
from recipes.engine.config import RunConfig
from recipes.engine.environment import describe
from recipes.engine.errors import UserError, one_line
from recipes.engine.folder import write_json
from recipes.engine.ranks import world_size
from recipes.erf import images, networks
from recipes.erf.results import Field, draw, table

MODELS = ("slak_tiny", "convnext_tiny", "replknet31_base")
SMALLEST = 64  # pixels; below, the last map is one pixel


@dataclasses.dataclass(frozen=True)
class Request:
    """Say what is measured.

    Attributes:
        models: names, in the order of the picture.
        checkpoints: name to the file of its weights; the others are random.
        files: images; empty for noise.
        count: images to average over.
        pixels: side of an image.
        seed: of random weights and noise.
        device: where it is done.
    """

    models: tuple[str, ...]
    checkpoints: dict[str, Path]
    files: list[Path]
    count: int
    pixels: int
    seed: int
    device: torch.device

    def images(self, channels: int) -> Iterator[Tensor]:
        """Yield the images one by one, on the device."""
        if self.files:
            found = images.photographs(self.files, channels, self.pixels)
        else:
            found = images.noise(self.count, channels, self.pixels, self.seed)
        return (image.to(self.device) for image in found)

    @property
    def source(self) -> str:
        """What the images are, in words."""
        kind = "images of a folder" if self.files else "smooth random noise images"
        return f"{self.count} {kind}" if self.count > 1 else f"1 {kind.replace('images', 'image')}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit status.

    A request that cannot be is told in one line on stderr, with status 2.
    """
    arguments = _parser().parse_args(argv)
    console = Console(highlight=False)
    try:
        run(_request(arguments), arguments.output, console)
    except (UserError, DataError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; no result was written", file=sys.stderr)
        return 130
    return 0


def run(request: Request, folder: Path, console: Console) -> None:
    """Measure every network, then print the table and write picture, report and scores."""
    machine = describe(request.device)
    where = f"{machine['device']}, torch {machine['torch']}"
    console.print(f"{request.source} at {request.pixels} px, on {where}", soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        fields = [_measure(request, name, bar) for name in request.models]
    console.print(table(fields))
    if any(field.weights == networks.RANDOM for field in fields):
        console.print(
            "Random weights have their layer scales at 1 and their BatchNorms set on the first image; "
            "their fields say what an architecture can see, not what a trained network looks at.",
            soft_wrap=True,
        )
    report = {
        "images": request.source,
        "pixels": request.pixels,
        "seed": request.seed,
        **machine,
        "models": [field.as_json() for field in fields],
    }
    draw(fields, folder / "erf.png", f"Effective receptive fields at {request.pixels} px, {request.source}")
    np.savez_compressed(
        folder / "scores.npz", **{field.name: field.score.float().numpy() for field in fields}
    )
    write_json(folder / "report.json", report)
    console.print(f"written to {folder}/: erf.png, report.json, scores.npz")


def _measure(request: Request, name: str, bar: Progress) -> Field:
    file = request.checkpoints.get(name)
    network = networks.trained_network(name, file) if file else networks.random_network(name, request.seed)
    network.model.to(request.device)
    task = bar.add_task(name, total=request.count)
    begin = time.perf_counter()
    try:
        if network.weights == networks.RANDOM:
            networks.settle_norms(network, next(request.images(network.channels)))
        shown = bar.track(request.images(network.channels), task_id=task, total=request.count)
        score = effective_receptive_field(network.model, shown, features=network.features)
    except (RuntimeError, ValueError, TypeError) as error:  # torch tells of shapes and memory by RuntimeError
        raise UserError(f"{name}: {one_line(str(error))}") from error
    if not bool(score.any()):
        raise UserError(f"{name}: the score is zero everywhere; the last map does not see the image")
    seconds = time.perf_counter() - begin
    if not bar.console.is_terminal:
        bar.console.print(f"{name} ({network.weights}): {seconds:.0f} s")
    return Field(name, network.weights, score, seconds)


def _request(arguments: argparse.Namespace) -> Request:
    if world_size() > 1:
        raise UserError(f"WORLD_SIZE is {world_size()}: this recipe runs in one process")
    for option, value, least in (("pixels", arguments.pixels, SMALLEST), ("images", arguments.images, 1)):
        if value < least:
            raise UserError(f"--{option} {value}: it must be at least {least}")
    checkpoints: dict[str, Path] = {}
    for text in arguments.checkpoint:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise UserError(f"--checkpoint {text}: NAME=FILE is expected")
        if name in checkpoints:
            raise UserError(f"--checkpoint {name}: it is given twice")
        checkpoints[name] = Path(file)
    return Request(
        # dict keeps the order and drops what is named twice
        models=tuple(dict.fromkeys([*arguments.models, *checkpoints])),
        checkpoints=checkpoints,
        files=images.find(arguments.data, arguments.images) if arguments.data else [],
        count=arguments.images,
        pixels=arguments.pixels,
        seed=arguments.seed,
        device=choose_device(RunConfig(device=arguments.device)),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=MODELS,
        metavar="NAME",
        help=f"of dst_models.list_models(), or module:callable of your own; by default {' '.join(MODELS)}",
    )
    add(
        "--checkpoint",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="weights of this model: a checkpoint of these recipes or a published file; may be repeated",
    )
    add("--data", type=Path, metavar="PATH", help="a folder of images; by default smooth random noise")
    add("--images", type=int, default=1, metavar="N", help="images to average over (1; published: 50)")
    add("--pixels", type=int, default=1024, metavar="S", help="side of an image (1024, the paper's)")
    add("--seed", type=int, default=0, metavar="N", help="of random weights and noise")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, ...")
    add("--output", type=Path, default=Path("runs/erf"), metavar="DIR", help="where to write (runs/erf)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
