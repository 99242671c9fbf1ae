from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.mixing import Mixing

steps = st.integers(0, 10_000)


def batch(size: int = 6, height: int = 12, width: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each sample a constant value, its number plus one, and its own class."""
    values = torch.arange(1.0, size + 1)
    return values.view(-1, 1, 1, 1).expand(size, 2, height, width).clone(), torch.arange(size)


@given(step=steps, size=st.integers(1, 7), smoothing=st.sampled_from([0.0, 0.1, 0.4]))
def test_targets_sum_to_one_and_name_only_the_two_mixed_classes(step, size, smoothing):
    images, labels = batch(size)
    _, targets = Mixing(classes=10, seed=0, smoothing=smoothing)(images, labels, step)
    assert torch.allclose(targets.sum(1), torch.ones(size))
    floor = smoothing / 10
    for row, own in zip(targets, labels.tolist(), strict=True):
        others = [c for c in range(10) if c not in (own, size - 1 - own)]
        assert torch.allclose(row[others], torch.full((len(others),), floor))


@given(step=steps)
def test_mixup_and_its_targets_have_the_same_share(step):
    images, labels = batch()
    mixed, targets = Mixing(classes=6, seed=0, cutmix=0.0, smoothing=0.0)(images, labels, step)
    share = targets[0, 0]
    partner = images.flip(0)
    torch.testing.assert_close(mixed, share * images + (1 - share) * partner)
    torch.testing.assert_close(
        targets, share * F.one_hot(labels, 6) + (1 - share) * F.one_hot(labels.flip(0), 6)
    )


@given(step=steps, height=st.integers(2, 17), width=st.integers(2, 17))
def test_cutmix_pastes_one_rectangle_and_its_share_is_what_is_left(step, height, width):
    images, labels = batch(4, height, width)
    mixed, targets = Mixing(classes=4, seed=0, mixup=0.0, smoothing=0.0)(images, labels, step)
    own = mixed == images
    assert torch.equal(own | (mixed == images.flip(0)), torch.ones_like(own))
    pasted = ~own[0, 0]
    assert all(torch.equal(~own[i, c], pasted) for i in range(4) for c in range(2))
    rows, columns = pasted.any(1), pasted.any(0)
    assert torch.equal(pasted, rows[:, None] & columns[None])
    for side in (rows, columns):
        assert int((side[1:] != side[:-1]).sum()) <= 2
    assert float(targets[0, 0]) == pytest.approx(1 - float(pasted.float().mean()))


def test_cutmix_areas_follow_the_drawn_share_where_the_edge_cuts_nothing_off():
    images, labels = batch(2, 64, 64)
    mixing = Mixing(classes=2, seed=0, mixup=0.0, smoothing=0.0)
    pasted = [1 - float(mixing(images, labels, step)[1][0, 0]) for step in range(2000)]
    # Beta(1, 1) draws the area u uniformly. Along an axis a cut of length s with a uniform centre keeps
    # s - s^2/4 on average, so the mean area is the integral of (sqrt(u) - u/4)^2 = u - u^1.5/2 + u^2/16.
    expected = 1 / 2 - 1 / 5 + 1 / 48
    assert np.mean(pasted) == pytest.approx(expected, abs=0.03)


def test_mixup_and_cutmix_alternate_by_the_switch():
    images, labels = batch()
    kinds = []
    for step in range(600):
        mixed, _ = Mixing(classes=6, seed=0)(images, labels, step)
        kinds.append(bool(((mixed == images) | (mixed == images.flip(0))).all()))
    assert abs(np.mean(kinds) - 0.5) < 0.11  # five standard errors


@given(step=steps, part=st.integers(0, 7))
def test_it_is_a_function_of_seed_step_and_part_and_changes_no_argument(step, part):
    images, labels = batch()
    before = images.clone()
    mixing = Mixing(classes=6, seed=5)
    first, again = mixing(images, labels, step, part), mixing(images, labels, step, part)
    assert torch.equal(images, before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_steps_parts_and_seeds_mix_differently():
    images, labels = batch()
    shares = {
        float(Mixing(classes=6, seed=seed, cutmix=0.0)(images, labels, step, part)[1][0, 0])
        for seed in (0, 1)
        for step in (0, 1)
        for part in (0, 1)
    }
    assert len(shares) == 8


def test_switched_off_only_the_smoothing_is_left_and_it_is_torchs():
    images, labels = batch()
    mixed, targets = Mixing(classes=6, seed=0, mixup=0.0, cutmix=0.0, smoothing=0.1)(images, labels, step=3)
    assert torch.equal(mixed, images)
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": 0},
        {"mixup": -0.1},
        {"cutmix": -1.0},
        {"switch": 1.5},
        {"smoothing": 1.0},
        {"smoothing": -0.1},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Mixing(**{"classes": 3, "seed": 0, **wrong})
