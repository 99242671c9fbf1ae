"""Train, evaluate or describe an image classifier: what stands behind the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from recipes.engine import build, checkpoint, environment, overrides, pictures, report
from recipes.engine.errors import NonFiniteError, UserError, as_user_error
from recipes.engine.folder import RunFolder, check_same_run, write_json
from recipes.engine.job import Config, Job, describe, describe_config, describe_counts, prepare, start
from recipes.engine.progress import Display
from recipes.engine.recorder import Recorder, StopSignal
from recipes.engine.state import State, check_same_shapes, set_random_state
from recipes.engine.training import autocast, train

_logger = logging.getLogger(__name__)
MISTAKES = 24  # images in the picture of mistakes
STOPPED = 130  # the exit status of a program that Ctrl-C ended


def run(config: Config, folder: RunFolder, resume: Path | None, console: Console) -> int:
    """Train, or go on where the folder or a checkpoint file stands, and report.

    Returns:
        0 when the training is done, 130 when the user stopped it before.

    Raises:
        UserError: if something about the request cannot be; nothing of another run is overwritten.
    """
    figures = _train(config, folder, resume, console)
    if figures is None:
        return STOPPED
    second = None
    if split := config.data.second_split:
        _say(
            console, [("once more", f"from the start on the {split} split, for the figure beside the first")]
        )
        data = dataclasses.replace(config.data, split=split, second_split=None)
        other = dataclasses.replace(config, name=f"{config.name} {split}", data=data)
        beside = _train(other, RunFolder(folder.path / split), None, console)
        if beside is None:
            return STOPPED
        second = (split, beside)
    write_json(folder.report, report.as_json(config.name, figures, second))
    console.print()
    with _log_file(folder):
        _say(console, report.as_rows(figures, second))
        _say(console, [("written to", f"{folder.path}/"), *folder.contents()])
    return 0


def evaluate(config: Config, file: Path, console: Console) -> int:
    """Print the held-out scores of a checkpoint, by its weights and their moving average; write nothing."""
    content = checkpoint.load(file)
    job = _with_data(config)
    kinds = {"weights": content["model"]} | (
        {"moving average": content["ema"]["module"]} if content["ema"] else {}
    )
    _say(console, [("checkpoint", f"{file}, step {content['step']:,}"), *describe(job)][:2])
    for name, tensors in kinds.items():
        check_same_shapes(job.model, tensors, str(file))
        job.model.load_state_dict(tensors)
        with autocast(job.model, config.run):
            scores = job.task.evaluate(job.model, job.feed.held_out())
        _say(console, [(name, ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))])
    return 0


def dry_run(config: Config, console: Console) -> int:
    """Print the whole config, the arithmetic of a step and the counts; write nothing."""
    job = prepare(config)
    _say(console, describe_config(config), between=" = ", width=0)
    console.print()
    _say(console, [*describe(job), *describe_counts(job, start(job, measure=True))])
    return 0


def stored_config(file: Path) -> Config:
    """Return the config that a checkpoint was written by.

    Raises:
        UserError: if the file cannot be read or is of another recipe.
    """
    return _config_of(checkpoint.load(file), file)


def _train(config: Config, folder: RunFolder, resume: Path | None, console: Console) -> report.Figures | None:
    """Train to the end and draw the pictures; None where the user stopped it before."""
    folder.check(config)
    job = _with_data(config)
    found = _find_checkpoint(config, folder, resume)
    state = start(job, measure=found is None)
    if found:
        with as_user_error(f"{found[0]} does not fit the data"):
            job.feed.load_state_dict(found[1]["sampler"])
        state.load_state_dict(found[1], str(found[0]))
    folder.claim(config)
    with _log_file(folder), StopSignal(lambda text: console.print(f"\n{text}")) as stop:
        _say_head(job, state, found and found[0], console)
        display = Display(console, label=config.name, epochs=config.optim.epochs, steps=job.total_steps)
        stored = overrides.to_primitives(config)
        recorder = Recorder(
            folder,
            lambda step: {"config": stored, "sampler": job.feed.state_dict(step)},
            config.optim,
            config.run,
            display=display,
            stop=stop,
            start=state,
        )
        if found:  # again, because counting and reporting since may have drawn numbers
            set_random_state(found[1]["random"])
        try:
            with display, contextlib.closing(recorder):
                done = train(state, job.task, job.feed, config.optim, config.run, recorder)
        except NonFiniteError as error:
            files = folder.checkpoints(config.run.keep).files()
            raise UserError(
                f"{error}; the last checkpoint is {files[-1] if files else 'not yet written'}"
            ) from error
        if not done:
            _say(console, [("stopped", f"at step {state.step:,}; the same command goes on from there")])
            return None
        _draw(job, state, folder)
        counted = build.count(job.model, job.input_size, state.optimizer.masks)
        return report.collect(state, counted, job.feed.sizes.held_out)


def _with_data(config: Config) -> Job:
    if not config.data.source:
        raise UserError(f"{config.model.name} is trained on a folder of images: --data PATH")
    return prepare(config)


def _find_checkpoint(
    config: Config, folder: RunFolder, resume: Path | None
) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to go on from: the named file, else the folder's newest whole one, else None."""
    checkpoints = folder.checkpoints(config.run.keep)
    if resume is None:
        found = checkpoints.latest()
    else:
        found = (resume, checkpoint.load(resume))
        if later := checkpoints.later_than(int(found[1].get("step", 0))):
            raise UserError(
                f"{folder.path} already holds {later[-1].name}, later than {resume}; --output another folder"
            )
    if found:
        check_same_run(
            _config_of(found[1], found[0]), config, str(found[0]), "ask for the same settings to go on"
        )
    return found


def _config_of(content: dict[str, Any], file: Path) -> Config:
    with as_user_error(f"{file} is a checkpoint of another recipe or version"):
        return overrides.from_primitives(Config, content.get("config", {}))


def _say_head(job: Job, state: State, resumed_from: Path | None, console: Console) -> None:
    """Write code, machine and config to the log, and the first lines on the screen."""
    machine = environment.describe(job.feed.device)
    for name, text in (*machine.items(), *describe_config(job.config)):
        _logger.info("%s = %s", name, text)
    rows = [
        ("device", f"{machine['device']}, torch {machine['torch']}"),
        *describe(job),
        *describe_counts(job, state),
    ]
    if resumed_from:
        where = (
            "the end of the run, nothing is left to train"
            if state.step == job.total_steps
            else f"step {state.step:,}"
        )
        rows.append(("going on", f"from {resumed_from}: {where}"))
    _say(console, rows)


def _say(console: Console, rows: Iterable[tuple[str, str]], between: str = "", width: int = 20) -> None:
    """Write rows of a name and a text to the screen and the log."""
    for name, text in rows:
        line = f"{name:<{width}}{between}{text}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        _logger.info("%s", line)


def _draw(job: Job, state: State, folder: RunFolder) -> None:
    """Draw the pictures of a finished training."""
    source = Path(job.config.data.source).name
    title = f"{job.config.model.name}, {state.sparsity:.0%} sparse, on {source}"
    engine = state.optimizer.sparsifier
    masks = pictures.to_cpu(engine.masks)
    pictures.draw_curves(state.history, folder.picture("curves"), title)
    pictures.draw_sparsity(masks, folder.picture("sparsity"), f"{title}: sparsity by layer")
    kernels = f"{title}: the large kernels after {state.step:,} steps"
    pictures.draw_kernels(pictures.to_cpu(engine.params), masks, folder.picture("kernels"), kernels)
    model = state.ema.module if state.ema else state.model
    surest = heapq.nlargest(MISTAKES, _mistakes(job, model), key=lambda mistake: mistake.probability)
    if surest:
        row = state.history[-1]
        images = job.feed.sizes.held_out
        wrong = images - round(row.get("ema_accuracy", row["accuracy"]) * images)
        told = f"misclassified: {wrong:,} of {images:,} held-out images of {source}"
        told += f", the {MISTAKES} surest" if wrong > MISTAKES else ""
        pictures.draw_mistakes(surest, folder.picture("mistakes"), told)


def _mistakes(job: Job, model: nn.Module) -> Iterator[pictures.Mistake]:
    """Yield the held-out images that a model misclassifies."""
    names = job.feed.images.classes
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (job.feed.images.mean, job.feed.images.std)
    )
    for images, labels in job.feed.held_out():
        with autocast(model, job.config.run):
            shares = job.task.probabilities(model, images)
        for index in (shares.argmax(1) != labels.cpu()).nonzero().flatten().tolist():
            said = int(shares[index].argmax())
            image = images[index].cpu() * std + mean
            truth = names[int(labels[index])]
            yield pictures.Mistake(image, truth, names[said], float(shares[index, said]))


@contextlib.contextmanager
def _log_file(folder: RunFolder) -> Iterator[None]:
    """Write what the packages log into the run's log file."""
    handler = logging.FileHandler(folder.log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("recipes", "dst", "dst_models")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()
