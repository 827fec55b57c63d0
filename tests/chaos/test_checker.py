"""The checker itself: hand-made good histories pass, every anomaly is noticed. A checker that has never failed is none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.checker import check
from tests.chaos.history import Event, FinalPartition, Produce, Receipt, Recorder, RunReceipt, Sent, load
from tests.chaos.story import Story
from tests.chaos.tales import BAD, GOOD, Tale


@pytest.mark.parametrize("tale", GOOD, ids=lambda tale: tale.__name__)
def test_good_histories_pass(tale: Tale, tmp_path: Path) -> None:
    assert codes(tale, tmp_path) == []


@pytest.mark.parametrize(("code", "tale"), BAD, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_bad_histories_are_noticed(code: str, tale: Tale, tmp_path: Path) -> None:
    assert code in codes(tale, tmp_path)


def codes(tale: Tale, directory: Path) -> list[str]:
    """What the checker says about a tale, read back from its file."""
    story = Story(directory)
    tale(story)
    story.recorder.close()
    events = load(directory / "history.jsonl")
    assert list(events) == story.recorder.events
    return [anomaly.code for anomaly in check(events)]


# -- a server that lies now and then ---------------------------------------------------------------------------------
def simulated(seed: int, lie: str) -> list[Event]:
    """A thousand sends against a perfect log in memory that tells one lie."""
    chance = random.Random(seed)
    events = Recorder(Path("/dev/null"), clock_ns=iter(range(1 << 30)).__next__)
    log: list[str] = []
    lying_at = chance.randrange(100, 900)
    for n in range(1000):
        mark = f"r{n}"
        op = events.invoke(f"c{n % 8}", Produce("t", (Sent(mark, 0),), f"k{n}"))
        if n != lying_at or lie != "drop":
            log.append(mark)
        if n == lying_at and lie == "swap":
            log[-1], log[-2] = log[-2], log[-1]
        if n == lying_at and lie == "repeat":
            log.append(mark)
        events.complete(op, "ok", result=Receipt((RunReceipt(0, max(0, len(log) - 1), 1),), n + 1))
    events.final(FinalPartition("t", 0, 0, len(log), tuple(log)))
    events.close()
    return events.events


@pytest.mark.parametrize("lie", ["drop", "swap", "repeat"])
def test_one_lie_in_a_thousand_is_noticed(lie: str) -> None:
    for seed in range(20):
        assert check(simulated(seed, lie))
        assert not check(simulated(seed, "none"))
