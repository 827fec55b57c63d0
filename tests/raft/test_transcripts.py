"""The golden stories: what the code does is what the files say."""

import pathlib

import pytest

from tests.raft.transcripts import TESTDATA, Story, run_file

FILES = sorted(TESTDATA.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_story_goes_as_written(path: pathlib.Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert run_file(text) == text


def test_all_stories_are_there() -> None:
    assert {
        "figure_7",
        "figure_8",
        "pre_vote",
        "check_quorum",
        "conflicts",
        "snapshot_conflict",
        "joint",
        "joint_votes",
        "read_index",
        "transfer",
        "stale_acks",
        "match_is_prev_plus_length",
        "damage",
        "old_terms",
        "slow_disk",
        "unverified",
    } <= {path.stem for path in FILES}


def test_a_story_that_goes_otherwise_is_noticed() -> None:
    text = (TESTDATA / "term_at_start.txt").read_text(encoding="utf-8")
    assert run_file(text.replace("commit=3", "commit=2")) != text.replace("commit=3", "commit=2")


def test_an_unknown_command_is_an_error() -> None:
    with pytest.raises(AttributeError):
        Story().run("frobnicate a")
