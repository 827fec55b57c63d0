"""A data directory that was damaged while no node ran on it: torn tails are cut, rot is refused, a checkpoint has a predecessor.

D-9, D-10; RELIABILITY 3.5-4. Every image is a copy of a directory that a killed server left behind.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from tests.chaos.http_client import Blocking
from tests.chaos.server import Launch, Server, ServerDied, by_hypercorn_alone, by_serve

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

RECORDS = 160
ADVICE = "restore"


@attrs.frozen
class Left:
    """What a killed server left: the directory, what it had acknowledged, and how its open segment went on in a later life."""

    data: Path
    values: list[str]
    continued: bytes
    node_id: str


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Some sealed segments, two checkpoints, an open segment with records below and above the synced watermark."""
    directory = tmp_path_factory.mktemp("left")
    values = [f"{n} " + "v" * 900 for n in range(RECORDS)]
    with Server(directory) as server:
        server.start()
        client = Blocking(server.port)
        for n, value in enumerate(values):
            assert client.post("/broker/topics/t/produce?partition=0", value.encode())["offset"] == n
        assert client.get("/admin/sealed/status")["sealed_segments"] >= 2 and len(server.checkpoints) == 2
        time.sleep(0.4)  # the synced watermark is written now and then, and when idle
        server.kill()
        kept = directory / "kept"
        shutil.copytree(server.data, kept)
        open_segment = server.segments[-1].name
        server.start()
        for n in range(5):
            Blocking(server.port).post("/broker/topics/t/produce?partition=0", f"later {n}".encode() + b"w" * 300)
        server.kill()
        continued = (server.data / "log" / open_segment).read_bytes()
    return Left(kept, values, continued, server.node_id)


@pytest.fixture
def image(left: Left, tmp_path: Path) -> Iterator[Server]:
    """A server on a fresh copy, not started."""
    with Server(tmp_path / "node", raft__node_id=left.node_id) as server:
        shutil.copytree(left.data, server.data)
        yield server


def check_serves(server: Server, left: Left) -> None:
    """It starts, serves what was acknowledged and takes more."""
    server.start()
    client = Blocking(server.port)
    page = client.get("/broker/topics/t/0/records?limit=1000")
    assert [one["value"] for one in page["messages"]][:RECORDS] == left.values
    assert client.post("/broker/topics/t/produce?partition=0", b"more")["offset"] == page["high_watermark"]


def check_refuses(server: Server, damaged: Path) -> None:
    """It does not start, names the file, says what to do, and leaves everything as it is."""
    before = {path: path.read_bytes() for path in server.data.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(ServerDied):
        server.start()
    assert server.wait() not in (0, None)
    assert damaged.name in server.stderr and ADVICE in server.stderr, server.stderr
    assert {path: path.read_bytes() for path in before} == before


def end_of_data(segment: bytes) -> int:
    return len(segment.rstrip(b"\0"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


# -- torn tails -----------------------------------------------------------------------------------------------------------
def cut(data: bytes, _continued: bytes, tail: int, length: int) -> bytes:
    return data[: tail + length]


def garbage(data: bytes, _continued: bytes, tail: int, length: int) -> bytes:
    return data[:tail] + random.Random(length).randbytes(length) + data[tail + length :]


def half_written(data: bytes, continued: bytes, tail: int, length: int) -> bytes:
    """The next frames, of which only the first ``length`` bytes reached the disk."""
    return data[:tail] + continued[tail : tail + length] + data[tail + length :]


def half_written_then_cut(_data: bytes, continued: bytes, tail: int, length: int) -> bytes:
    return continued[: tail + length]


def last_bytes_zero(_data: bytes, continued: bytes, tail: int, length: int) -> bytes:
    """Everything of the next frames was written but their last ``length`` bytes."""
    end = end_of_data(continued)
    return continued[: max(tail, end - length)] + b"\0" * (len(continued) - max(tail, end - length))


@pytest.mark.parametrize(
    "tear", [cut, garbage, half_written, half_written_then_cut, last_bytes_zero], ids=lambda tear: tear.__name__
)
def test_a_torn_tail_costs_nothing_acknowledged(
    tear: Callable[[bytes, bytes, int, int], bytes], left: Left, image: Server
) -> None:
    """D-10. Lengths around what a frame header is, a sector, and anything between."""
    segment = image.segments[-1]
    original = segment.read_bytes()
    tail = _tail(original, left.continued)
    for length in (1, 47, 512, random.randrange(2, 600)):
        shutil.rmtree(image.data)
        shutil.copytree(left.data, image.data)
        segment.write_bytes(tear(original, left.continued, tail, length))
        check_serves(image, left)
        image.kill()


def _tail(original: bytes, continued: bytes) -> int:
    """Where the later life began to write: the first byte that differs, at most a word after the tail (its magic is not zero)."""
    return next(at for at, (old, new) in enumerate(zip(original, continued, strict=False)) if old != new)


# -- rot --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("launch", [by_serve, by_hypercorn_alone], ids=lambda launch: launch.name)
def test_a_flipped_bit_in_synced_data_is_refused(launch: Launch, left: Left, tmp_path: Path) -> None:
    """D-9: what was promised is not cut away in silence, and not skipped either."""
    with Server(tmp_path / "node", launch, raft__node_id=left.node_id) as server:
        shutil.copytree(left.data, server.data)
        segment = server.segments[-1]
        flip(segment, end_of_data(segment.read_bytes()) // 2)
        check_refuses(server, segment)


@pytest.mark.parametrize("from_end", [1, 100, 200])
def test_a_damaged_seal_is_refused(from_end: int, image: Server) -> None:
    segment = image.segments[1]
    flip(segment, segment.stat().st_size - from_end)
    check_refuses(image, segment)


def test_a_missing_segment_is_refused(image: Server) -> None:
    segment = image.segments[1]
    segment.unlink()
    check_refuses(image, segment)


def test_a_shorter_open_segment_is_refused(image: Server) -> None:
    """Synced bytes are gone: a cut tail it is not."""
    segment = image.segments[-1]
    data = segment.read_bytes()
    segment.write_bytes(data[: end_of_data(data) // 2])
    check_refuses(image, segment)


@pytest.mark.parametrize("damage", ["missing", "both slots", "empty"])
def test_without_its_meta_file_a_log_is_refused(damage: str, image: Server) -> None:
    """What this disk promised, and whom it voted for, is unknown."""
    meta = image.data / "log" / "meta"
    if damage == "missing":
        meta.unlink()
    elif damage == "empty":
        meta.write_bytes(b"")
    else:
        flip(meta, 40)
        flip(meta, 4096 + 40)
    check_refuses(image, meta)


@pytest.mark.parametrize("slot", [0, 4096])
def test_one_damaged_slot_of_the_meta_file_is_survived(slot: int, left: Left, image: Server) -> None:
    flip(image.data / "log" / "meta", slot + 40)
    check_serves(image, left)


def test_rot_in_an_old_segment_is_said_and_never_served(left: Left, image: Server) -> None:
    """D-9: sealed segments are not read at start; the record that rotted is refused, the others are served."""
    segment = image.segments[0]
    data = segment.read_bytes()
    at = data.index(left.values[20].encode()) + 300
    flip(segment, at)
    image.start()
    client = Blocking(image.port)
    reply = client.request("GET", "/broker/topics/t/0/records?offset=20&limit=1")
    assert reply.status == 500 and reply.json["error"] == "storage_damaged", reply
    rest = client.get(f"/broker/topics/t/0/records?offset=100&limit={RECORDS}")
    assert [one["value"] for one in rest["messages"]] == left.values[100:]


# -- checkpoints --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", ["flipped", "empty", "missing"])
def test_a_damaged_checkpoint_has_a_predecessor(damage: str, left: Left, image: Server) -> None:
    newest = image.checkpoints[-1]
    if damage == "flipped":
        flip(newest, newest.stat().st_size // 2)
    elif damage == "empty":
        newest.write_bytes(b"")
    else:
        newest.unlink()
    check_serves(image, left)
    older = int(image.checkpoints[0].stem.partition("-")[2], 16)
    assert damage == "missing" or (newest.name in image.stderr and f"checkpoint_index={older}" in image.stderr)


def test_without_any_checkpoint_the_whole_log_is_applied(left: Left, image: Server) -> None:
    for checkpoint in image.checkpoints:
        flip(checkpoint, 40)
    check_serves(image, left)
    assert "checkpoint_index=0" in image.stderr
