"""Consensus stories as text: a command, four dashes, what happened. The files in ``testdata`` are both test and documentation.

A block is a command line, ``----`` and the expected output up to an empty line. ``python -m tests.raft.transcripts --rewrite``
writes the outputs anew; the change is then read like any other. Nothing here knows time or chance: a node ticks, a message is
delivered, a disk syncs when the script says so (a disk syncs at once unless it is held).
"""

from __future__ import annotations

import argparse
import pathlib
import re
from typing import Any

from ayder.entries import EntryKind, HardState, LogEntry, NodeId
from ayder.errors import AyderError
from ayder.raft.consensus import Consensus, Ready
from ayder.raft.membership import Membership
from ayder.raft.messages import (
    AppendEntries,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    Outbound,
    RequestVote,
    Snapshot,
    SnapshotMeta,
    VoteReply,
)
from ayder.raft.progress import Limits, ReadRange, SendSnapshot
from tests.sim.disk import Disk

__all__ = ["TESTDATA", "Story", "run_file"]

TESTDATA = pathlib.Path(__file__).parent / "testdata"


def entry_text(entry: LogEntry) -> str:
    """``index@term`` and what is in it."""
    if entry.kind is EntryKind.MEMBERSHIP:
        return f"{entry.index}@{entry.term}:{membership_text(Membership.decode(entry.payload))}"
    return f"{entry.index}@{entry.term}" + (f":{entry.payload.decode()}" if entry.payload else "")


def membership_text(membership: Membership) -> str:
    """``a,b/a,c+d``: voters, the outgoing half, learners."""
    text = ",".join(membership.voters)
    text += "/" + ",".join(membership.outgoing) if membership.outgoing else ""
    return text + ("+" + ",".join(membership.learners) if membership.learners else "")


def message_text(to: NodeId, message: Message) -> str:
    """One line for one message."""
    text = f"{message.sender}->{to} {type(message).__name__} t{message.term}"
    if isinstance(message, RequestVote):
        flags = " pre-vote" * message.pre_vote + " transfer" * message.transfer
        text += f" last={message.last_index}@{message.last_term}{flags}"
    elif isinstance(message, VoteReply):
        text += f" for t{message.poll_term} " + ("granted" if message.granted else "refused") + " pre-vote" * message.pre_vote
    elif isinstance(message, AppendEntries):
        entries = " ".join(entry_text(entry) for entry in message.entries)
        text += f" prev={message.prev_index}@{message.prev_term} [{entries}] commit={message.commit_index}"
        text += f" barrier={message.barrier.index}" if message.barrier else ""
    elif isinstance(message, AppendReply):
        text += f" match={message.index}" if message.accepted else f" refused={message.index}"
        text += "" if message.accepted else f" hint={message.hint_index}@{message.hint_term}"
        text += f" incarnation={message.incarnation}" if message.incarnation else ""
        text += " damaged" * message.damaged
    elif isinstance(message, Heartbeat):
        text += f" commit={message.commit_index} round={message.round}"
    elif isinstance(message, HeartbeatReply):
        text += f" round={message.round} verified={message.verified_index}" + " damaged" * message.damaged
    elif isinstance(message, InstallSnapshot):
        meta = message.snapshot.meta
        text += f" {meta.index}@{meta.term} members={membership_text(meta.membership)}"
    return text


class Story:
    """A cluster in the hands of a script. Each command method gets its words and leaves lines in ``out``."""

    def __init__(self) -> None:
        self.disks: dict[NodeId, Disk] = {}
        self.cores: dict[NodeId, Consensus] = {}
        self.founders: tuple[NodeId, ...] = ()
        self.queue: list[Outbound] = []
        self.stashes: dict[str, list[Outbound]] = {}
        self.held: set[NodeId] = set()
        self.open: dict[NodeId, Ready] = {}
        self.seen: dict[NodeId, tuple[Any, ...]] = {}
        self.quiet_streams: set[NodeId] = set()
        self.out: list[str] = []
        self.batch = 64
        self.extra: dict[str, Any] = {}

    def run(self, command: str) -> str:
        """The output of one command line."""
        self.out = []
        name, *words = command.split()
        try:
            getattr(self, "do_" + name.replace("-", "_"))(*words)
        except AyderError as error:
            self.out.append(f"error: {error.code.wire}: {error.message}")
        return "\n".join(self.out) or "ok"

    # -- making a cluster ---------------------------------------------------------------------------------------------
    def do_cluster(self, *words: str) -> None:
        """``cluster a b c [batch=1] [inflight=1]``: founders with empty disks, every node an election timeout of 10 ticks."""
        self.__init__()  # type: ignore[misc]  # nothing of an earlier cluster in the same file remains
        names = [word for word in words if "=" not in word]
        options = dict(word.split("=") for word in words if "=" in word)
        self.founders = tuple(names)
        self.batch = int(options.get("batch", 64))
        self.extra = {"max_inflight_appends": int(options.get("inflight", 64))}
        for name in names:
            self.disks[name] = Disk()
            self.start(name)

    def do_spare(self, name: str) -> None:
        """A node that belongs to nothing yet."""
        self.disks[name] = Disk()
        self.start(name, founders=())

    def do_log(self, name: str, *terms: str) -> None:
        """``log a 1 1 2``: the node starts again with entries of these terms on disk, its term is the last of them."""
        disk = self.disks[name] = Disk()
        entries = [
            LogEntry(index, int(term), EntryKind.BLOCK, 0, f"{term}.{index}".encode()) for index, term in enumerate(terms, 1)
        ]
        disk.write(entries, HardState(int(terms[-1])) if terms else None, None, False)
        disk.sync()
        self.start(name)

    def do_term(self, name: str, term: str, vote: str = "") -> None:
        """The node starts again with this term and vote on disk."""
        self.disks[name].hard_state = HardState(int(term), vote or None)
        self.start(name)

    def start(self, name: NodeId, founders: tuple[NodeId, ...] | None = None) -> None:
        """Read the disk and begin."""
        self.cores[name] = Consensus(
            node_id=name,
            voters=self.founders if founders is None else founders,
            election_ticks=10,
            heartbeat_ticks=3,
            limits=Limits(max_append_entries=self.batch, catch_up_entries=2, **self.extra),
            **self.disks[name].core_arguments(),
        )
        self.open.pop(name, None)
        self.seen[name] = self.facts(name)

    # -- events -------------------------------------------------------------------------------------------------------
    def do_campaign(self, name: str) -> None:
        """Its election timeout is over."""
        self.touch(name, self.cores[name].campaign)

    def do_tick(self, name: str, count: str = "1") -> None:
        """Ticks of one node, or of ``all``."""
        for _ in range(int(count)):
            for one in sorted(self.cores) if name == "all" else [name]:
                self.touch(one, self.cores[one].tick)

    def do_silence(self, *names: str) -> None:
        """These nodes have not heard a leader for an election timeout, without having stood themselves."""
        for name in names:
            self.cores[name]._silent_ticks = 10

    def do_propose(self, name: str, *values: str) -> None:
        """A block with this value."""
        for value in values:
            self.touch(name, lambda value=value: self.cores[name].propose(EntryKind.BLOCK, value.encode(), 0))

    def do_read(self, name: str, token: str) -> None:
        """A linearizable read."""
        self.touch(name, lambda: self.cores[name].read_index(token))

    def do_transfer(self, name: str, target: str) -> None:
        """Hand over."""
        self.touch(name, lambda: self.cores[name].transfer_leadership(target))

    def do_add(self, name: str, target: str) -> None:
        """Add a learner."""
        self.touch(name, lambda: self.cores[name].add_learner(target, 0))

    def do_promote(self, name: str, target: str) -> None:
        """Make it a voter."""
        self.touch(name, lambda: self.cores[name].promote(target, 0))

    def do_remove(self, name: str, target: str) -> None:
        """Remove a member."""
        self.touch(name, lambda: self.cores[name].remove(target, 0))

    def do_reset(self, name: str, peer: str) -> None:
        """The stream to this follower broke."""
        self.touch(name, lambda: self.cores[name].peer_reset(peer))

    def do_hold_disk(self, name: str) -> None:
        """Writes of this node stay under way."""
        self.held.add(name)

    def do_sync(self, name: str) -> None:
        """What is under way reaches the disk; later writes sync at once again."""
        self.held.discard(name)
        if name in self.open:
            self.disks[name].sync()
            self.close(name)
        self.pump(name)

    def do_restart(self, name: str) -> None:
        """Power cut: what was not synced is gone."""
        disk = self.disks[name]
        disk._writing = None
        disk.recover()
        self.held.discard(name)
        self.start(name)
        self.out.append(self.line(name))

    def do_rot(self, name: str, index: str) -> None:
        """A synced entry no longer verifies; the node starts again."""
        for frame in self.disks[name].frames:
            if frame.entry.index == int(index):
                frame.good = False
        self.do_restart(name)

    def do_snapshot(self, name: str) -> None:
        """The node takes a snapshot at its commit index and drops the log before it."""
        core, disk = self.cores[name], self.disks[name]
        index = core.commit_index
        term = core.log.term_at(index)
        assert term is not None
        disk.checkpoint(Snapshot(SnapshotMeta(index, term, core.membership_at(index), 0), b""), 0)
        core.log_compacted(index)
        core.log.cache_bytes = 0
        core.log._shrink()

    # -- messages -----------------------------------------------------------------------------------------------------
    def do_deliver(self, *words: str) -> None:
        """``deliver [a->b] [Type]``: the matching messages that are under way now, in order."""
        for outbound in self.take(words):
            self.arrive(outbound)

    def do_drop(self, *words: str) -> None:
        """They are lost."""
        self.take(words)

    def do_stash(self, name: str, *words: str) -> None:
        """Put the matching messages aside under a name."""
        self.stashes[name] = self.take(words)

    def do_replay(self, name: str) -> None:
        """They arrive after all; they stay for another time."""
        for outbound in self.stashes[name]:
            self.arrive(outbound)

    def do_inject(self, link: str, kind: str, *words: str) -> None:
        """``inject a->b AppendEntries TERM PREV@TERM commit=N`` or ``inject a->b InstallSnapshot``: a message made by hand."""
        sender, to = link.split("->")
        message: Message
        if kind == "InstallSnapshot":
            snapshot = self.disks[sender].snapshot
            assert snapshot is not None
            message = InstallSnapshot(self.cores[sender].current_term, sender, snapshot)
        else:
            prev_index, prev_term = (int(part) for part in words[1].split("@"))
            commit = int(words[2].removeprefix("commit="))
            message = AppendEntries(int(words[0]), sender, prev_index, prev_term, (), commit)
        self.arrive(Outbound(to, message))

    def do_stabilize(self, *names: str) -> None:
        """Deliver among these nodes (all by default) until nothing is under way; what goes to others is lost."""
        inside = set(names) or set(self.cores)
        for _ in range(200):
            taken, self.queue = self.queue, []
            if not taken:
                return
            for outbound in taken:
                if outbound.to in inside and outbound.message.sender in inside:
                    self.arrive(outbound)
        raise AssertionError("it does not come to rest")

    def take(self, words: tuple[str, ...]) -> list[Outbound]:
        """Remove the matching messages from the queue."""
        link = next((word for word in words if "->" in word), "*->*")
        kind = next((word for word in words if "->" not in word), "")
        sender, to = link.split("->")
        taken = [
            one
            for one in self.queue
            if sender in ("*", one.message.sender) and to in ("*", one.to) and kind in ("", type(one.message).__name__)
        ]
        self.queue = [one for one in self.queue if not any(one is other for other in taken)]
        return taken

    def arrive(self, outbound: Outbound) -> None:
        """Deliver one message."""
        if outbound.to in self.cores:
            self.out.append(message_text(*outbound))
            self.touch(outbound.to, lambda: self.cores[outbound.to].step(outbound.message))

    # -- what a driver does -------------------------------------------------------------------------------------------
    def touch(self, name: NodeId, call: Any) -> None:
        """One step of one node and everything that follows from it."""
        call()
        self.pump(name)

    def pump(self, name: NodeId) -> None:
        """Messages into the queue, writes to the disk."""
        core = self.cores[name]
        while True:
            self.queue += core.take_messages()
            if core._open is None and (ready := core.take_ready()) is not None:
                self.open[name] = ready
                if ready.needs_write:
                    self.disks[name].write(ready.entries, ready.hard_state, ready.snapshot, ready.repaired)
                if ready.needs_write and name in self.held:
                    continue
                if ready.needs_write:
                    self.disks[name].sync()
                self.close(name)
                continue
            if not self.stream(core):
                break
        for read in core.take_reads():
            self.out.append(f"  {name}: read {read.token} " + (f"at {read.index}" if read.index is not None else "failed"))
        core.check_invariants()
        self.report(name)

    def close(self, name: NodeId) -> None:
        """The write is over: its messages leave."""
        ready = self.open.pop(name)
        self.cores[name].persisted()
        self.queue += ready.messages

    def stream(self, core: Consensus) -> bool:
        """Whether some follower's stream had something to do."""
        busy = False
        for peer in list(core.leadership.progress) if core.leadership else []:
            while (work := core.next_append(peer)) is not None:
                busy = True
                message: Message | None
                if isinstance(work, ReadRange):
                    message = core.append_read(work, self.disks[core.node_id].read(work.first, work.last))
                elif isinstance(work, SendSnapshot):
                    snapshot = self.disks[core.node_id].snapshot
                    assert snapshot is not None
                    message = core.snapshot_message(work, snapshot)
                else:
                    message = work
                assert message is not None, work
                self.queue.append(Outbound(peer, message))
        return busy

    # -- reports ------------------------------------------------------------------------------------------------------
    def facts(self, name: NodeId) -> tuple[Any, ...]:
        """What is worth a line when it changes."""
        core = self.cores[name]
        return (core.role, core.current_term, core.commit_index, core.membership, core.damaged)

    def report(self, name: NodeId) -> None:
        """Say what changed."""
        core, before, now = self.cores[name], self.seen[name], self.facts(name)
        self.seen[name] = now
        if before[:2] != now[:2]:
            self.out.append(f"  {name}: {core.role.value} in t{core.current_term}")
        if before[2] != now[2]:
            self.out.append(f"  {name}: commits {core.commit_index}")
        if before[3] != now[3]:
            self.out.append(f"  {name}: members {membership_text(core.membership)}")
        if before[4] != now[4]:
            self.out.append(f"  {name}: repaired")

    def line(self, name: NodeId) -> str:
        """One node in one line."""
        core = self.cores[name]
        known = [core.log.term_at(index) for index in range(core.log.first_index, core.last_index + 1)]
        terms = " ".join(str(term) for term in known)
        text = f"{name}: {core.role.value} t{core.current_term} vote={core.voted_for} commit={core.commit_index}"
        text += f" log=[{terms}]" + (f" from {core.log.first_index}" if core.log.first_index > 1 else "")
        return text + (f" damaged incarnation={core.repair.incarnation}" if core.damaged else "")

    def do_status(self, *names: str) -> None:
        """All nodes, or some."""
        self.out += [self.line(name) for name in names or sorted(self.cores)]

    def do_progress(self, name: str) -> None:
        """A leader's followers."""
        leadership = self.cores[name].leadership
        self.out += [repr(progress) for progress in leadership.progress.values()] if leadership else ["does not lead"]

    def do_messages(self) -> None:
        """What is under way."""
        self.out += [message_text(*outbound) for outbound in self.queue]


def run_file(text: str) -> str:
    """The file with the outputs this code gives."""
    story, parts = Story(), []
    for block in re.split(r"\n{2,}", text.strip()):
        lines = block.split("\n")
        comments = [line for line in lines if line.startswith("#")]
        commands = [line for line in lines if not line.startswith("#")]
        if not commands:
            parts.append("\n".join(comments))
            continue
        commands = commands[: commands.index("----")] if "----" in commands else commands
        outputs = [story.run(command) for command in commands]
        shown = [text for text in outputs if text != "ok"] or ["ok"]
        parts.append("\n".join([*comments, *commands, "----", *shown]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Check the files, or write them anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewrite", action="store_true")
    rewrite = parser.parse_args().rewrite
    for path in sorted(TESTDATA.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        found = run_file(text)
        print(path.name, "ok" if found == text else "differs")
        if rewrite:
            path.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
