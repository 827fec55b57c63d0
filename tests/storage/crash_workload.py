"""Random work on a store and its checkpoints, written down so that every disk a power cut leaves can be judged.

Owns: the workload, its history (what was acknowledged after how many disk operations, what was under way), and the judgement of
a recovered disk. Must not know: how images are made (``disks.py``).

Judgement: the recovered log is an acknowledged state, or that plus a prefix of the one append under way; every run of it is found
and read back except those below a log start that some drop or rewrite had been given; the checkpoint is the newest acknowledged
one or the one under way; opening once more changes nothing; the log goes on.
"""

from __future__ import annotations

import os
import random

import attrs

from ayder.entries import HardState, LogEntry
from ayder.storage.aof import AofLogStore, AofOptions
from ayder.storage.checkpoints import FileCheckpointStore
from tests.storage.disks import Killed, KillSwitch, RecordingFiles
from tests.storage.model import Applied, check_entries, check_runs, make_entry, note, random_run, replay

LOG, CHECKPOINTS = "/d/log", "/d/checkpoints"


def options_for(seed: int) -> AofOptions:
    """Small segments, each seed its own mixture; the watermark is written after every sync, now and then or hardly ever."""
    choose = random.Random(seed)
    return AofOptions(
        segment_bytes=choose.choice((200, 400, 900, 2000)), segment_blocks=choose.choice((3, 1000)),
        preallocate_bytes=choose.choice((0, 300, 1024)), watermark_interval_ms=choose.choice((0, 5, 10**6)),
        reserve_bytes=choose.choice((0, 100)),
    )  # fmt: skip


@attrs.define
class State:
    """A state a recovered disk may show."""

    entries: tuple[LogEntry, ...] = ()
    hard_state: HardState = HardState()


@attrs.define
class Moment:
    """From ``operations`` disk operations on, this is acknowledged and that is under way."""

    operations: int
    acknowledged: State
    under_way: list[State]
    checkpoints: list[tuple[int, bytes] | None]
    """Which checkpoint may be the newest."""
    log_starts: dict[int, int]
    """Runs below may be gone."""


class Workload:
    """One random history on ``files``; ``moments`` is its record."""

    def __init__(self, seed: int, files: RecordingFiles) -> None:
        self._choose = random.Random(seed)
        self._files = KillSwitch(files)
        self.kills = 0
        self._recorded = files
        self.options = options_for(seed)
        self._now_ns = 0
        self.state = State()
        self.applied = Applied()
        self.log_starts: dict[int, int] = {}
        self.checkpoint: tuple[int, bytes] | None = None
        self.moments: list[Moment] = []
        self._term = 1
        self._mark()
        self._open()

    def run(self, steps: int) -> None:
        """Do that many random things."""
        for _ in range(steps):
            self._now_ns += self._choose.randrange(4_000_000)
            if self._choose.random() < 0.06:
                self._files.countdown = self._choose.randrange(8)
            try:
                self._step()
            except Killed:
                self._start_again()
        self._files.countdown = -1
        self.store.close()
        self._mark()

    def _step(self) -> None:
        choice = self._choose.random()
        if choice < 0.42:
            self._append()
        elif choice < 0.47:
            self._vote()
        elif choice < 0.62:
            self._apply()
        elif choice < 0.77:
            self._seal()
        elif choice < 0.9:
            self._collect()
        elif choice < 0.96:
            self._write_checkpoint()
        elif choice < 0.98:
            self.store.idle()
        else:
            self.store.close()
            self._open()

    def _start_again(self) -> None:
        """The process was killed and starts again, perhaps killed while it does: what it then shows has to last."""
        self.kills += 1
        self._files.countdown = self._choose.choice((-1, 3, 10))
        possible = self.moments[-1]
        while True:
            try:
                self._open()
                break
            except Killed:
                self._files.countdown = -1
        self._files.countdown = -1
        self.state = self._recognize(self.store, [possible.acknowledged, *possible.under_way])
        self.checkpoint = self.checkpoints.newest()
        assert self.checkpoint in possible.checkpoints
        self._mark()

    def _mark(self, under_way: list[State] | None = None, checkpoints: list[tuple[int, bytes] | None] | None = None) -> None:
        self.moments.append(
            Moment(
                len(self._recorded.operations), self.state, under_way or [], checkpoints or [self.checkpoint], {**self.log_starts}
            )
        )

    def _open(self) -> None:
        self.store = AofLogStore.open(LOG, self.options, monotonic_ns=lambda: self._now_ns, files=self._files)
        self.checkpoints = FileCheckpointStore(CHECKPOINTS, self._files)
        for placed in self.applied.by_index.values():
            if placed and placed[0][1].index >= self.store.unsealed_first_index:
                note(self.store, placed)

    def _append(self) -> None:
        choose = self._choose
        entries = self.state.entries
        first = len(entries) + 1
        if choose.random() < 0.2:  # a new leader replaces what was not committed
            first = choose.randint(self.applied.index + 1, first)
            self._term += 1
        new = []
        for index in range(first, first + choose.randint(1, 4)):
            longest = 800 if choose.random() < 0.1 else 30
            runs = [random_run(choose, choose.randrange(3), longest) for _ in range(choose.randint(0, 2))]
            new.append(make_entry(index, self._term, runs))
        state = HardState(self._term, choose.choice((None, "node-1"))) if choose.random() < 0.2 else None
        self._write(new, state)

    def _vote(self) -> None:
        self._term += 1
        self._write([], HardState(self._term, "node-2"))

    def _write(self, new: list[LogEntry], state: HardState | None) -> None:
        before = self.state
        base = before.entries[: new[0].index - 1] if new else before.entries
        hard_state = state or before.hard_state
        under_way = [State(before.entries, hard_state)]
        under_way += [State((*base, *new[: n + 1]), hard_state) for n in range(len(new))]
        self._mark(under_way)
        self.store.append(new, state)
        self.state = under_way[-1]
        self._mark()

    def _apply(self) -> None:
        """Commit and apply some of what is in the log."""
        for entry in self.state.entries[self.applied.index : self._choose.randint(self.applied.index, len(self.state.entries))]:
            note(self.store, self.applied.apply(entry))

    def _seal(self) -> None:
        info = next(info for info in self.store.segments() if not info.sealed)
        end = info.last_index or info.first_index - 1
        if info.segment_id != self.store.segments()[-1].segment_id and end <= self.applied.index:
            self.store.seal(info.segment_id, self.applied.ends_at[end])

    def _collect(self) -> None:
        """Trim, then drop or rewrite a sealed segment."""
        choose = self._choose
        ends = self.applied.ends_at[self.applied.index]
        sealed = [info.segment_id for info in self.store.segments() if info.sealed]
        if not sealed or not ends:
            return
        for uid, end in ends.items():
            start = self.log_starts.get(uid, 0)
            self.log_starts[uid] = choose.randint(start, min(end, start + 12))
        starts = {uid: self.log_starts[uid] for uid in ends}
        self._mark()
        segment_id = choose.choice(sealed)
        if self.store.live_bytes(segment_id, starts) == 0:
            self.store.drop_segment(segment_id)
        else:
            self.store.rewrite_segment(segment_id, starts)

    def _write_checkpoint(self) -> None:
        new = (self.applied.index, self._choose.randbytes(self._choose.choice((20, 1500))))
        if self.checkpoint is not None and new[0] <= self.checkpoint[0]:
            return
        self._mark(checkpoints=[self.checkpoint, new])
        self.checkpoints.write(*new)
        self.checkpoint = new
        self._mark()

    # -- judging --------------------------------------------------------------------------------------------------
    def at(self, operations: int) -> Moment:
        """What held when that many operations had been done. Several marks at one number: the last one is it."""
        return max((m for m in self.moments if m.operations <= operations), key=lambda m: m.operations)

    def moments_at(self, operations: int) -> list[Moment]:
        """All marks made at that point of the record."""
        last = self.at(operations).operations
        return [moment for moment in self.moments if moment.operations == last]

    def judge(self, operations: int, disk: RecordingFiles) -> int:
        """Open the disk and check it against the record. Raises whatever is wrong. Returns the operations opening took."""
        candidates = self.moments_at(operations)
        # The last mark at this point tells what was acknowledged; the ones before it at the same point, what could be under way.
        newest = candidates[-1]
        allowed = [newest.acknowledged, *newest.under_way]
        checkpoint = FileCheckpointStore(CHECKPOINTS, disk)
        assert checkpoint.newest() in newest.checkpoints
        assert checkpoint.damaged == []
        start = len(disk.operations)
        store = AofLogStore.open(LOG, self.options, monotonic_ns=lambda: 0, files=disk)
        opened = len(disk.operations) - start
        found = self._recognize(store, allowed)
        check_entries(store, found.entries)
        applied = replay(store, found.entries)
        check_runs(store, applied, newest.log_starts, every=5)
        assert store.verify() == []
        store.close()
        self._second_time(disk, found)
        return opened

    def _recognize(self, store: AofLogStore, allowed: list[State]) -> State:
        first = store.first_index
        tail = store.read_entries(first, store.last_index, 1 << 40) if first <= store.last_index else []
        for state in allowed:
            same_length = (len(state.entries), state.hard_state) == (store.last_index, store.hard_state)
            if same_length and list(state.entries[first - 1 :]) == tail:
                return state
        raise AssertionError(
            f"entries {first}..{store.last_index} with {store.hard_state} are none of "
            f"{[(len(state.entries), state.hard_state) for state in allowed]}"
        )

    def _second_time(self, disk: RecordingFiles, found: State) -> None:
        before = disk.tree()
        store = AofLogStore.open(LOG, self.options, monotonic_ns=lambda: 0, files=disk)
        assert store.report.torn_bytes == 0
        assert store.report.warnings == []
        store.close()
        assert disk.tree() == before
        assert disk.open_descriptors == 0
        store = AofLogStore.open(LOG, self.options, monotonic_ns=lambda: 0, files=disk)
        more = make_entry(len(found.entries) + 1, 1 << 40, [])
        store.append([more], None)
        check_entries(store, [*found.entries, more])
        store.close()


def soak_workloads(default: int) -> int:
    """How many workloads to run: more before a release (environment variable ``CRASH_WORKLOADS``)."""
    return int(os.environ.get("CRASH_WORKLOADS", default))
