"""The time that is left, from what was projected and what was measured since."""

import pytest

from eval import projection
from eval.projection import Estimate, Remaining, duration


def test_the_time_left_follows_what_was_measured() -> None:
    """Ten seconds projected in each task, two of them for prompts; it takes twice as long."""
    remaining = Remaining(dict.fromkeys("abc", Estimate(10.0, 2.0, 1000)))
    remaining.begin("a", 100)
    assert remaining.left(2 * 2.0) == pytest.approx(2 * 28.0)
    remaining.advance(50, 500)
    assert remaining.left(2 * 6.0) == pytest.approx(2 * 24.0)
    remaining.advance(50, 500)
    remaining.begin("b", 100)
    # Three quarters of it were answered before: eight seconds of scoring become two.
    remaining.advance(75, 0)
    assert remaining.left(2 * 12.0) == pytest.approx(2 * (2.0 + 10.0))
    remaining.advance(25, 250)
    assert remaining.left(2 * 14.0) == pytest.approx(2 * 10.0)


def test_lines_come_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(projection.time, "monotonic", lambda: next(now))
    remaining = Remaining({"hellaswag": Estimate(100.0, 0.0, 1000)})
    remaining.begin("hellaswag", 40_000)
    for _ in range(3):
        remaining.advance(2_000, 100)
    # 11 s for a tenth of it, so 99 s for the rest.
    assert capsys.readouterr().err == (
        "hellaswag: 4,000 of 40,000 requests, task 1 of 1, about 2 min left\n"
    )


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (700, "12 min"), (6000, "1 h 40 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
