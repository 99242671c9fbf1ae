"""What is shown: plain lines where nobody looks, a live bar on a terminal, and a pace that is true."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from recipes.engine.progress import Display, Pace, Reading, clock


def reading(step=3, **changes):
    values = {
        "step": step,
        "epoch": 1,
        "loss": 0.1234,
        "score": 0.9876,
        "images_per_second": 1234.5,
        "sparsity": 0.4,
        "seconds_left": 61.0,
    }
    return Reading(**values | changes)


def test_a_reading_tells_loss_accuracy_pace_sparsity_and_time_left():
    assert str(reading()) == "loss 0.123 · held out 98.76% · 1,234 images/s · 40.0% sparse · 1:01 left"
    assert str(reading(score=None, seconds_left=None)).endswith(
        "held out - · 1,234 images/s · 40.0% sparse · - left"
    )


def test_without_a_terminal_each_epoch_is_one_plain_line():
    console = Console(file=io.StringIO(), width=40)
    with Display(console, label="digits", epochs=2, steps=6) as display:
        for step in range(1, 7):
            display.step(reading(step))
            if step % 3 == 0:
                display.epoch(reading(step, epoch=step // 3))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("digits · epoch 2/2 · step 6/6 · loss 0.123")
    assert "\x1b" not in console.file.getvalue()


def test_on_a_terminal_there_is_a_bar_that_gets_full():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Display(console, label="digits", epochs=2, steps=6) as display:
        for step in range(1, 7):
            display.step(reading(step, epoch=(step + 2) // 3))
        display.epoch(reading(6, epoch=2))
    shown = console.file.getvalue()
    assert "digits · epoch 1/2" in shown
    assert "6/6" in shown
    assert "━" in shown
    assert "40.0% sparse · 1:01 left" in shown


@given(st.integers(1, 50), st.floats(0.01, 100), st.integers(0, 1000))
def test_the_pace_is_images_over_seconds_since_the_first_step(steps, seconds, before):
    pace = Pace(total=before + 64 * (steps + 11))
    for step in range(1, steps + 2):
        pace.update(1000 + step * seconds, before + 64 * step)
    assert pace.images_per_second == pytest.approx(64 / seconds)
    assert pace.seconds_left == pytest.approx(10 * seconds)


def test_there_is_no_pace_before_the_second_step():
    pace = Pace(total=100)
    assert (pace.images_per_second, pace.seconds_left) == (0.0, None)
    pace.update(5.0, 10)
    assert (pace.images_per_second, pace.seconds_left) == (0.0, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01"), (90_000, "1d 1:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text
