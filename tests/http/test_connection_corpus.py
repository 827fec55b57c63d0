"""Every case of the raw-bytes corpus on the connection in memory, whatever the segmentation."""

import itertools
import logging
import random

import pytest

from tests.http.corpus import CASES, Case
from tests.http.toy import Client


def run(case: Case, pieces: list[bytes]) -> Client:
    client = Client.open()
    for piece in pieces:
        if client.transport.closed:
            break
        client.send(piece)
    return client


def check(case: Case, client: Client) -> None:
    final = [answer for answer in client.answers() if answer.status != 100]  # a 100 is sent when the body came later
    assert tuple(answer.status for answer in final) == case.statuses
    assert client.ended is case.ends
    assert len(client.application.seen) == case.requests
    for answer in final:
        if answer.status >= 400 and answer.status != 403:
            assert answer.body.startswith(b'{"ok": false') or answer.headers[b"x-method"] == b"HEAD"
    if final:
        assert (final[-1].headers.get(b"connection") == b"close") is case.ends


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "ayder.http")


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 90


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_whole_and_byte_by_byte_and_cut_anywhere(case: Case) -> None:
    check(case, run(case, [case.raw]))
    check(case, run(case, [case.raw[at : at + 1] for at in range(len(case.raw))]))
    dice = random.Random(case.name)
    for _ in range(8):
        cuts = sorted({0, len(case.raw), *(dice.randrange(len(case.raw) + 1) for _ in range(dice.randrange(1, 12)))})
        check(case, run(case, [case.raw[start:end] for start, end in itertools.pairwise(cuts)]))
