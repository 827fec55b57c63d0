"""Seeds of the simulator, and tests of the simulator itself: it repeats itself, its faults bite, its checks can fail."""

from __future__ import annotations

import collections
import os
import random
import subprocess
import sys

import attrs
import pytest

from ayder.entries import EntryKind, HardState, LogEntry
from tests.sim import mutants
from tests.sim.__main__ import seed_of_commit
from tests.sim.clients import Clients, Operation
from tests.sim.disk import Disk
from tests.sim.knobs import Knobs
from tests.sim.mutants import MUTANTS, Mutant, applied, kill, splice, stories_that_notice
from tests.sim.world import World, run_seed

QUICKEST = sorted((mutant for mutant in MUTANTS if mutant.seeds), key=lambda mutant: mutant.seeds)[:10]
FAULTS = (
    "loss", "duplicate", "ghosts", "stall", "fsync_error", "rot", "crash_every_ms", "mid_step", "partition_every_ms",
    "pause_every_ms", "hunt", "membership_every_ms", "transfer_every_ms",
)  # fmt: skip


# -- seeds ----------------------------------------------------------------------------------------------------------------
def test_forty_seeds_keep_every_rule_and_are_not_vacuous() -> None:
    totals: collections.Counter[str] = collections.Counter()
    for seed in range(40):
        totals.update(attrs.asdict(run_seed(seed)))
    assert totals["appends"] > 1_000 and totals["reads"] > 500
    assert totals["elections"] > 60 and totals["crashes"] > 60 and totals["changes"] > 20 and totals["snapshots"] > 20


@pytest.mark.slow
def test_new_seeds_of_this_commit() -> None:
    """Each commit explores other seeds; a failure prints its seed and knobs."""
    first = seed_of_commit()
    for seed in range(first, first + 500):
        run_seed(seed)


def test_a_seed_is_one_run_for_ever() -> None:
    """Twenty seeds, two processes, two hash seeds: equal traces."""
    program = "from tests.sim.world import run_seed\nprint([run_seed(seed).trace for seed in range(20)])"
    command = [sys.executable, "-c", program]
    traces = [
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        ).stdout
        for hash_seed in ("1", "4242")
    ]
    assert traces[0] == traces[1] and len(set(traces[0].split(","))) == 20


def test_a_failing_seed_says_which_and_with_what_knobs() -> None:
    found = kill(MUTANTS[0], range(50))
    assert found is not None
    seed, failure = found
    assert str(failure).startswith(f"seed {seed} at ") and "Knobs(nodes=" in str(failure)
    run_seed(seed)


# -- the world --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", FAULTS)
def test_each_class_of_fault_is_off_in_a_good_part_of_the_seeds(fault: str) -> None:
    on = sum(bool(getattr(Knobs.draw(random.Random(f"knobs {seed}")), fault)) for seed in range(500))
    assert 100 < on < 400


def test_groups_of_every_size_are_drawn() -> None:
    drawn = collections.Counter(Knobs.draw(random.Random(f"knobs {seed}")).nodes for seed in range(200))
    assert set(drawn) == {1, 3, 5, 7}


def test_without_faults_one_leader_serves_everyone() -> None:
    outcome = World(1, Knobs(clients=4)).run()
    assert outcome.elections == 1 and outcome.crashes == 0 and outcome.appends > 100 and outcome.reads > 100


def log(first: int, last: int, term: int = 1) -> list[LogEntry]:
    return [LogEntry(index, term, EntryKind.BLOCK, 0, b"x") for index in range(first, last + 1)]


def test_what_was_not_synced_may_be_lost_and_what_was_is_kept() -> None:
    kept = set()
    for seed in range(50):
        disk = Disk()
        disk.write(log(1, 3), HardState(1), None, False)
        disk.sync()
        disk.write(log(4, 6), HardState(2, "a"), None, False)
        disk.power_cut(random.Random(seed), torn=True, rot=False)
        assert disk.last_index >= 3 and not disk.damaged
        kept.add((disk.last_index, disk.hard_state.term))
    assert {index for index, _ in kept} == {3, 4, 5, 6} and {term for _, term in kept} == {1, 2}


def test_a_rotten_record_is_cut_and_confessed() -> None:
    disk = Disk()
    disk.write(log(1, 5), HardState(1), None, False)
    disk.sync()
    disk.power_cut(random.Random(3), torn=False, rot=True)
    assert disk.damaged and disk.incarnation == 1 and disk.last_index < 5


def test_recovery_never_joins_two_histories() -> None:
    splice()


# -- the client's view --------------------------------------------------------------------------------------------------------
def history(*operations: tuple[str, float, float, int]) -> Clients:
    clients = Clients(World(0, Knobs()), random.Random(0))
    clients.history = [
        Operation(client, number, kind, began, ended, result)
        for number, (client, (kind, began, ended, result)) in enumerate(enumerate(operations))
    ]
    return clients


GOOD = (("append", 0, 5, 1), ("append", 6, 9, 2), ("read", 10, 11, 2), ("append", 12, -1, -1), ("read", 12, 14, 3))
VALUES = [b"0/0", b"1/1", b"3/3"]


def test_a_good_history_is_accepted() -> None:
    history(*GOOD).check(VALUES)


@pytest.mark.parametrize(
    ("operations", "values"),
    [
        (GOOD, [b"0/0", b"3/3"]),
        (GOOD, [b"1/1", b"0/0", b"3/3"]),
        (GOOD, [b"0/0", b"1/1", b"1/1"]),
        ((("append", 0, 5, 2), ("append", 6, 9, 1)), [b"1/1", b"0/0"]),
        ((("append", 0, 5, 1), ("read", 6, 7, 0)), [b"0/0"]),
        ((("read", 0, 5, 1), ("read", 6, 7, 0)), [b"x"]),
        ((("read", 0, 5, 2),), [b"x"]),
        ((("append", 0, 5, 0),), [b"0/0"]),
    ],
    ids=["lost", "moved", "twice", "order", "stale read", "read goes back", "phantom", "no position"],
)
def test_a_bad_history_is_rejected(operations: tuple[tuple[str, float, float, int], ...], values: list[bytes]) -> None:
    with pytest.raises(AssertionError):
        history(*operations).check(values)


# -- mutants --------------------------------------------------------------------------------------------------------------------
def assert_killed(mutant: Mutant) -> None:
    if mutant.story:
        assert mutant.story in stories_that_notice(mutant)
    if mutant.directed:
        with applied(mutant), pytest.raises(AssertionError):
            getattr(mutants, mutant.directed)()
    if mutant.seeds:
        assert kill(mutant, range(max(60, 5 * mutant.seeds))) is not None


@pytest.mark.parametrize("mutant", QUICKEST, ids=lambda mutant: mutant.name)
def test_the_quickest_mutants_are_killed(mutant: Mutant) -> None:
    assert kill(mutant, range(60)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_killed(mutant: Mutant) -> None:
    assert_killed(mutant)


def test_every_mutant_has_a_killer_and_its_patches_are_undone() -> None:
    assert len(MUTANTS) >= 28 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert [mutant.name for mutant in MUTANTS if not (mutant.seeds or mutant.story or mutant.directed)] == []
    for mutant in MUTANTS:
        before = [(cls, name, cls.__dict__.get(name)) for cls, name, _ in mutant.patches]
        with applied(mutant):
            assert all(cls.__dict__[name] is value for cls, name, value in mutant.patches)
        assert before == [(cls, name, cls.__dict__.get(name)) for cls, name, _ in mutant.patches]
