"""The loop on a toy task: what it computes, when it saves, and that it goes on bit for bit from anywhere."""

import dataclasses

import pytest
import torch
from helpers.tiny_runs import differing
from torch import nn

from recipes.engine.build import build_state
from recipes.engine.config import OptimConfig, RunConfig, SparseConfig
from recipes.engine.errors import NonFiniteError, UserError
from recipes.engine.state import State
from recipes.engine.task import Classification
from recipes.engine.training import take_step, train

STEPS = 5
SPARSE = SparseConfig(sparsity=0.5, distribution="uniform", interval=3)
OPTIM = OptimConfig(epochs=2, warmup_epochs=1, batch_size=8, ema_decay=0.9, lr=0.01)
RUN = RunConfig()


class ToyFeed:
    """Random batches, a function of the position; `spoil` makes one of them infinite."""

    steps_per_epoch = STEPS

    def __init__(self, accumulation=1, spoil=None):
        self.accumulation = accumulation
        self.spoil = spoil

    def batch(self, key):
        generator = torch.Generator().manual_seed(key)
        images = torch.randn(8, 6, generator=generator)
        return images * torch.inf if key == self.spoil else images, (images.sum(1) > 0).long()

    def train(self, epoch, first_step):
        for step in range(first_step, STEPS):
            first = (epoch * STEPS + step) * self.accumulation
            yield [self.batch(first + part) for part in range(self.accumulation)]

    def held_out(self):
        return [self.batch(1000), self.batch(1001)]


class Recording:
    """A watcher that keeps copies of every checkpoint."""

    def __init__(self, stop_at=None):
        self.saved, self.best, self.told, self.epochs, self.stop_at = {}, [], [], [], stop_at

    def step(self, state, loss):
        self.told.append((state.step, loss))

    def epoch(self, state, evaluated):
        self.epochs.append((state.step, evaluated))

    def save(self, state, best):
        self.saved[state.step] = copied(state.state_dict())
        if best:
            self.best.append(state.step)

    def stop_requested(self):
        return self.stop_at is not None and bool(self.told) and self.told[-1][0] >= self.stop_at


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def new_state(optim=OPTIM, sparse=SPARSE, run=RUN, seed=0) -> State:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 2))
    return build_state(model, Classification(2), sparse, optim, run, steps_per_epoch=STEPS)


def run_to_the_end(state=None, optim=OPTIM, run=RUN, feed=None, stop_at=None):
    watcher = Recording(stop_at)
    state = state or new_state(optim)
    done = train(state, Classification(2), feed or ToyFeed(), optim, run, watcher)
    return state, watcher, done


@pytest.fixture(scope="module")
def uninterrupted():
    return run_to_the_end(run=RunConfig(checkpoint_interval=1))


@pytest.mark.parametrize("step", range(1, 2 * STEPS + 1))
def test_training_goes_on_bit_for_bit_from_every_step(uninterrupted, step):
    """Among them are 3, 6 and 9, right after a mask update, and 5, the end of an epoch."""
    state, watcher, _ = uninterrupted
    resumed = new_state(seed=99)
    torch.rand(17)
    before = copied(watcher.saved[step])
    resumed.load_state_dict(watcher.saved[step], "the checkpoint")
    assert differing(before, watcher.saved[step]) == []
    assert differing(resumed.state_dict(), watcher.saved[step]) == []
    run_to_the_end(resumed)
    assert resumed.optimizer.sparsifier.updates > 0
    assert differing(resumed.state_dict(), state.state_dict()) == []
    assert differing(state.state_dict(), watcher.saved[2 * STEPS]) == []


def test_another_seed_gives_other_bits(uninterrupted):
    other, _, _ = run_to_the_end(new_state(seed=1))
    assert differing(other.state_dict(), uninterrupted[0].state_dict())


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7])
def test_a_stop_request_saves_after_the_step_and_goes_on_bit_for_bit(uninterrupted, stop_at):
    state, watcher, done = run_to_the_end(stop_at=stop_at)
    assert not done
    assert state.step == stop_at
    assert max(watcher.saved) == stop_at
    resumed = new_state()
    resumed.load_state_dict(watcher.saved[stop_at], "the checkpoint")
    _, _, done = run_to_the_end(resumed)
    assert done
    assert differing(resumed.state_dict(), uninterrupted[0].state_dict()) == []


def test_a_stop_at_the_last_step_is_a_finished_run():
    assert run_to_the_end(stop_at=2 * STEPS)[2]


def test_saving_and_evaluating_change_nothing(uninterrupted):
    plain, watcher, _ = run_to_the_end(run=RunConfig(eval_interval=9))
    assert list(watcher.saved) == [2 * STEPS]
    for key in ("model", "optimizer", "scheduler", "ema", "random"):
        assert differing(plain.state_dict()[key], uninterrupted[0].state_dict()[key]) == []


def test_what_is_saved_when():
    _, watcher, _ = run_to_the_end(run=RunConfig(checkpoint_interval=2))
    assert list(watcher.saved) == [2, 4, 5, 6, 8, 10]
    assert watcher.epochs == [(5, True), (10, True)]
    assert [step for step, _ in watcher.told] == list(range(1, 11))
    rows = watcher.saved[10]["history"]
    assert [row["step"] for row in rows] == [5, 10]
    for epoch, row in enumerate(rows):
        losses = [loss for step, loss in watcher.told if epoch * STEPS < step <= (epoch + 1) * STEPS]
        assert row["train_loss"] == pytest.approx(sum(losses) / STEPS)
        assert row["sparsity"] == pytest.approx(0.5)
    best = max(max(row["accuracy"], row["ema_accuracy"]) for row in rows)
    assert watcher.saved[10]["best"] == best
    assert watcher.best[0] == 5


@pytest.mark.parametrize("spoiled", [0, 3, 7])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(spoiled):
    state, watcher = new_state(), Recording()
    with pytest.raises(NonFiniteError, match=f"the loss is nan at step {spoiled + 1}; .* did not take"):
        train(
            state, Classification(2), ToyFeed(spoil=spoiled), OPTIM, RunConfig(checkpoint_interval=1), watcher
        )
    assert state.step == spoiled
    for parameter in state.model.parameters():
        assert parameter.isfinite().all()
    if spoiled:
        assert differing(watcher.saved[spoiled]["optimizer"], state.state_dict()["optimizer"]) == []


def test_accumulated_micro_batches_are_one_large_batch():
    model = nn.Linear(6, 2, bias=False).double()
    states = []
    feed = ToyFeed(accumulation=4)
    parts = [(images.double(), targets) for images, targets in next(feed.train(0, 0))]
    whole = [(torch.cat([images for images, _ in parts]), torch.cat([targets for _, targets in parts]))]
    for micro_batches in (parts, whole):
        copy = nn.Linear(6, 2, bias=False).double()
        copy.load_state_dict(model.state_dict())
        state = build_state(copy, Classification(2), SPARSE, OPTIM, RunConfig(), steps_per_epoch=STEPS)
        loss = take_step(state, DoubleTask(), micro_batches, OPTIM, RunConfig())
        states.append((copy.weight.detach(), loss))
    torch.testing.assert_close(states[0], states[1], rtol=1e-12, atol=1e-14)


class DoubleTask:
    """Cross entropy in float64."""

    headline = "accuracy"

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_clipping_bounds_the_norm_of_the_active_gradient(monkeypatch):
    seen = []
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda params, norm: seen.append(float(real(list(params), norm)))
    )
    optim = dataclasses.replace(OPTIM, max_grad_norm=1e-3)
    state = new_state(optim, dataclasses.replace(SPARSE, algorithm="set"))
    feed = ToyFeed()
    take_step(state, Classification(2), next(feed.train(0, 0)), optim, RunConfig())
    assert len(seen) == 1


def test_bfloat16_computes_the_forward_pass_in_bfloat16_and_keeps_float32_weights():
    seen = []

    class Watching(Classification):
        def loss(self, model, batch):
            seen.append(model(batch[0]).dtype)
            return super().loss(model, batch)

    state = new_state()
    take_step(state, Watching(2), next(ToyFeed().train(0, 0)), OPTIM, RunConfig(precision="bfloat16"))
    assert seen == [torch.bfloat16]
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())


@pytest.mark.parametrize("algorithm", ["slak", "set", "rigl", "static"])
@pytest.mark.parametrize("distribution", ["uniform", "erk", "snip"])
def test_every_choice_of_the_config_trains_at_exactly_its_sparsity(algorithm, distribution):
    sparse = dataclasses.replace(SPARSE, algorithm=algorithm, distribution=distribution, interval=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 2))
    first = ToyFeed().batch(0)
    state = build_state(
        model, Classification(2), sparse, OPTIM, RunConfig(), steps_per_epoch=STEPS, first_batch=first
    )
    run_to_the_end(state)
    zeros = sum(int((model[index].weight == 0).sum()) for index in (0, 2))
    assert sum(state.optimizer.sparsifier.counts.values()) == 80
    assert zeros >= 80
    assert zeros == 80 or algorithm != "static"
    for name, parameter in state.ema.module.named_parameters():
        if name in state.optimizer.masks:
            assert (parameter[~state.optimizer.masks[name]] == 0).all()


def test_without_an_average_there_is_none_in_checkpoint_and_history():
    state, watcher, _ = run_to_the_end(optim=dataclasses.replace(OPTIM, ema_decay=None))
    assert state.ema is None
    assert watcher.saved[10]["ema"] is None
    assert "ema_accuracy" not in state.history[-1]


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(uninterrupted):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 2))
    state = build_state(model, Classification(2), SPARSE, OPTIM, RunConfig(), steps_per_epoch=STEPS)
    before = copied(state.state_dict())
    with pytest.raises(
        UserError, match=r"FILE: the checkpoint is of another model: 0\.weight is \(16, 6\) .* \(12, 6\)"
    ):
        state.load_state_dict(uninterrupted[1].saved[3], "FILE")
    assert differing(before, state.state_dict()) == []


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler", "ema", "random", "step", "history"])
def test_a_checkpoint_without_a_part_is_refused_in_one_line(uninterrupted, part):
    content = {key: value for key, value in uninterrupted[1].saved[3].items() if key != part}
    with pytest.raises(UserError, match="FILE: ") as caught:
        new_state().load_state_dict(content, "FILE")
    assert "\n" not in str(caught.value)


def test_the_evaluation_counts_every_image_once_and_leaves_the_mode():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    batches = [
        (torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])),
        (torch.eye(2)[:1], torch.tensor([0])),
    ]
    for training in (True, False):
        model.train(training)
        scores = Classification(2).evaluate(model, batches)
        assert model.training is training
    assert scores["accuracy"] == pytest.approx(3 / 4)
    expected = nn.functional.cross_entropy(
        torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    )
    assert scores["loss"] == pytest.approx(float(expected))


def test_many_classes_are_also_judged_by_the_best_five():
    logits = torch.eye(30)
    batches = [(logits, torch.arange(30).roll(1))]
    scores = Classification(30).evaluate(nn.Sequential(nn.Identity(), _Scaled()), batches)
    assert scores["accuracy"] == 0
    assert "accuracy_top5" in scores


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale
