"""The rules for clusters, on histories written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.history import FinalPartition, Page, Read
from tests.chaos.story import Story
from tests.cluster.clients import LOCAL, STARTS
from tests.cluster.judge import check_cluster, nodes_agree, one_leader_a_term


class ClusterStory(Story):
    def read_on(self, node: str, marks: str, *, start: int = 0, end: int | None = None) -> None:
        op = self.recorder.invoke(LOCAL + node, Read("t", 0, start))
        end = start + len(marks) if end is None else end
        self.recorder.complete(op, "ok", status=200, result=Page(start, tuple(marks), start + len(marks), end, 0))

    def codes(self) -> set[str]:
        return {anomaly.code for anomaly in check_cluster(self.recorder.events)}


@pytest.fixture
def story(tmp_path: Path) -> Iterator[ClusterStory]:
    story = ClusterStory(tmp_path)
    yield story
    story.recorder.close()


def test_a_local_read_may_be_old(story: ClusterStory) -> None:
    story.three()
    story.read_on("n2", "x")
    story.read_on("n3", "")
    story.read_on("n2", "xyz")
    story.end("xyz")
    assert story.codes() == set()


def test_a_linearizable_read_may_not(story: ClusterStory) -> None:
    story.three()
    story.read("x", end=1)
    story.end("xyz")
    assert story.codes() == {"L9"}


def test_a_local_read_of_another_record(story: ClusterStory) -> None:
    story.three()
    story.read_on("n2", "xy")
    story.read_on("n3", "yx")
    story.end("xyz")
    assert story.codes() == {"L3", "L6"}


def test_a_local_read_of_what_was_refused(story: ClusterStory) -> None:
    story.three()
    story.refused(story.send("w"))
    story.read_on("n2", "w", start=3)
    story.end("xyz")
    assert "L5" in story.codes()


def test_a_local_read_of_what_was_undone(story: ClusterStory) -> None:
    story.three()
    story.unknown(story.send("w"))
    story.read_on("n2", "w", start=3)
    story.end("xyz")
    assert "L6" in story.codes()


def test_a_node_that_goes_back(story: ClusterStory) -> None:
    story.three()
    story.read_on("n2", "xyz")
    story.read_on("n2", "xy")
    story.end("xyz")
    assert story.codes() == {"C4"}


def test_a_node_that_starts_again(story: ClusterStory) -> None:
    story.three()
    story.read_on("n2", "xyz")
    story.recorder.process(STARTS + "n2")
    story.read_on("n2", "xy")
    story.end("xyz")
    assert story.codes() == set()


def test_nodes_that_differ() -> None:
    same, other = (FinalPartition("t", 0, 0, 2, marks) for marks in (("x", "y"), ("x", "z")))
    assert list(nodes_agree({"n1": {("t", 0): same}, "n2": {("t", 0): same}})) == []
    assert [anomaly.code for anomaly in nodes_agree({"n1": {("t", 0): same}, "n2": {("t", 0): other}})] == ["L3"]


def test_two_leaders_in_a_term() -> None:
    assert list(one_leader_a_term({1: {"n1"}, 2: {"n2"}})) == []
    assert [anomaly.code for anomaly in one_leader_a_term({1: {"n1"}, 2: {"n1", "n2"}})] == ["R1"]
