"""Commands and blocks: version 1 is what it was, a block walks back to what went in, nothing unknown is skipped."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayder.commands import (
    BLOCK_HEADER_BYTES,
    COMMAND_HEADER_BYTES,
    RUN,
    BatchHead,
    Command,
    CommitOffset,
    CommitOffsets,
    CreateTopic,
    DeleteTopic,
    Retention,
    SetRetention,
    TrimPartition,
    TrimPartitions,
    decode_block,
    encode_block,
    encode_command,
)
from ayder.errors import CorruptLog
from ayder.runs import Run, encode_values

GOLDEN = Path(__file__).parent / "golden"

COMMANDS: dict[str, Command] = {
    "create-topic": CreateTopic("orders", 3, "sealed", Retention(60_000, None), "sync-majority", 16_384, 604_800_000),
    "delete-topic": DeleteTopic("orders"),
    "commit-offsets": CommitOffsets((CommitOffset(1, 2, "group", (1 << 63) - 1), CommitOffset(1, 0, "other", -1, True))),
    "set-retention": SetRetention("*", None, Retention(0, (1 << 63) - 1)),
    "set-retention-partition": SetRetention("orders", 1023, Retention(None, 1)),
    "trim-partitions": TrimPartitions((TrimPartition(65_538, 1 << 40, 1 << 45), TrimPartition(65_537, 0, 0))),
    "batch-head": BatchHead(65_538, b"d" * 16 + b"key", 2),
}
TAGS = {CreateTopic: 2, DeleteTopic: 3, CommitOffsets: 4, SetRetention: 5, TrimPartitions: 6, BatchHead: 7}


@pytest.mark.parametrize("name", COMMANDS)
def test_version_1_of_every_command_is_what_it_was(name: str) -> None:
    stored = bytes.fromhex((GOLDEN / f"command-{name}.hex").read_text())
    tag, body = encode_command(COMMANDS[name])
    assert (tag, body) == (stored[0], stored[1:])
    assert tag == TAGS[type(COMMANDS[name])]
    (_, _, _, read) = next(decode_block(encode_block([(stored[0], stored[1:])])))
    assert read == COMMANDS[name]


def test_every_command_has_a_golden_file() -> None:
    import typing

    assert {type(command) for command in COMMANDS.values()} == set(typing.get_args(Command)) == set(TAGS)


def test_the_block_is_what_it_was() -> None:
    block = encode_block([(RUN, encode_values(1, 0, [b"a", b"bc"])), encode_command(DeleteTopic("orders"))])
    assert block == bytes.fromhex((GOLDEN / "block.hex").read_text())


names = st.text(min_size=1, max_size=8)
numbers = st.integers(0, 1023)
offsets = st.integers(-1, 2**63 - 1)
commands = st.one_of(
    st.builds(DeleteTopic, names),
    st.builds(BatchHead, st.integers(0, 2**48), st.binary(max_size=30), st.integers(1, 9)),
    st.builds(
        CommitOffsets,
        st.lists(st.builds(CommitOffset, st.integers(1, 99), numbers, names, offsets, st.booleans()), max_size=3).map(tuple),
    ),
    st.builds(SetRetention, names, st.none() | numbers, st.builds(Retention, st.none() | st.integers(0, 2**63 - 1))),
)
slots = st.lists(commands | st.lists(st.binary(max_size=9), min_size=1, max_size=4), max_size=8)


@settings(max_examples=80, deadline=None)
@given(slots)
def test_a_block_walks_back_to_what_went_in(parts: list[Command | list[bytes]]) -> None:
    block = encode_block([(RUN, encode_values(1, 2, p)) if isinstance(p, list) else encode_command(p) for p in parts])
    found: list[Command | list[bytes]] = []
    end = BLOCK_HEADER_BYTES
    for tag, position, length, command in decode_block(block):
        assert position == end + COMMAND_HEADER_BYTES
        end = position + length
        if command is None:
            assert tag == RUN
            run = Run(block[position:end])
            found.append(run.values(0, run.count))
        else:
            found.append(command)
    assert found == parts
    assert end == len(block)


def refused(block: bytes) -> str:
    with pytest.raises(CorruptLog) as caught:
        list(decode_block(block))
    return str(caught.value)


def test_what_this_release_does_not_know_stops_it() -> None:
    known = encode_block([encode_command(DeleteTopic("t"))])
    assert "block version 2" in refused(b"\2" + known[1:])
    assert "tag 99 is unknown" in refused(encode_block([(99, b"\x90")]))
    newer = bytearray(known)
    newer[BLOCK_HEADER_BYTES + 1] = 2
    assert "version 2" in refused(bytes(newer))


@pytest.mark.parametrize("body", [b"", b"\x90", b"\x91\x01", b"\x91\xa1\xff", b"\xc1", b"\x91" * 5000])
def test_a_body_that_is_no_such_command_stops_it(body: bytes) -> None:
    assert "command tag 3" in refused(encode_block([(3, body)]))


def test_a_block_cut_anywhere_is_refused() -> None:
    block = encode_block([(RUN, encode_values(1, 0, [b"abc"])), encode_command(DeleteTopic("orders"))])
    for length in range(len(block)):
        refused(block[:length])


def test_a_run_without_room_for_its_header_is_refused() -> None:
    """Its facts would be read from the command behind it."""
    for length in (0, 1, 39):
        refused(encode_block([(RUN, bytes(length)), encode_command(DeleteTopic("a-name-long-enough-to-be-read-as-a-run"))]))
