"""Hand-made histories: what a good one may look like, and one (at least) for every anomaly. The checker is tested with them."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos.history import FinalPartition, Page, Produce, Receipt, RunReceipt, Sent, fingerprint
from tests.chaos.story import Story

__all__ = ["BAD", "GOOD", "Tale"]

Tale = Callable[[Story], None]


# -- good -----------------------------------------------------------------------------------------------------------
def plain(s: Story) -> None:
    s.three()
    s.read("xyz", end=3)
    s.end("xyz")


def nothing(s: Story) -> None:
    s.end("")


def unknown_that_happened(s: Story) -> None:
    s.put("x", 0, 1)
    s.unknown(s.send("y"))
    s.end("xy")


def unknown_that_did_not(s: Story) -> None:
    s.put("x", 0, 1)
    s.unknown(s.send("y"))
    s.end("x")


def never_answered(s: Story) -> None:
    s.send("x")
    s.put("y", 1, 2)
    s.end("xy")


def refused_and_absent(s: Story) -> None:
    s.refused(s.send("x"))
    s.put("y", 0, 1)
    s.end("y")


def retry_with_one_effect(s: Story) -> None:
    s.unknown(s.send("x", key="k"))
    s.put("y", 1, 2)
    s.acked(s.send("x", key="k"), 0, 1, duplicate=True)
    s.end("xy")


def retry_that_was_the_first(s: Story) -> None:
    s.unknown(s.send("x", key="k"))
    s.put("y", 0, 1)
    s.acked(s.send("x", key="k"), 1, 2)
    s.end("yx")


def refused_then_retried(s: Story) -> None:
    s.refused(s.send("x", key="k"))
    s.acked(s.send("x", key="k"), 0, 1)
    s.end("x")


def same_value_sent_twice_without_key(s: Story) -> None:
    s.unknown(s.send("x"))
    s.put("x", 1, 2)
    s.end("xx")


def reused_key_refused(s: Story) -> None:
    s.acked(s.send("x", key="k"), 0, 1)
    s.refused(s.send("y", key="k"))
    s.end("x")


def concurrent_sends_any_order(s: Story) -> None:
    one, two = s.send("x"), s.send("y")
    s.acked(one, 1, 1)
    s.acked(two, 0, 1)
    s.end("yx")


def second_of_two_at_once_wins(s: Story) -> None:
    one, two = s.send("x", key="k"), s.send("x", key="k")
    s.acked(two, 0, 1)
    s.acked(one, 0, 1, duplicate=True)
    s.end("x")


def batch_in_one_stretch(s: Story) -> None:
    s.acked(s.send("x", "y", "z"), 0, 1, count=3)
    s.end("xyz")


def unknown_batch_whole(s: Story) -> None:
    s.unknown(s.send("x", "y"))
    s.end("xy")


def batch_over_partitions(s: Story) -> None:
    op = s.recorder.invoke("a", Produce("t", (Sent("x", 0), Sent("y", 1), Sent("z", 0)), "k"))
    runs = (RunReceipt(0, 0, 2), RunReceipt(1, 0, 1))
    s.recorder.complete(op, "ok", status=200, result=Receipt(runs, 1))
    s.end("xz")
    s.end("y", partition=1)


def trimmed(s: Story) -> None:
    s.three()
    s.read("xyz", end=3)
    s.trim(2)
    s.read("z", start=2, end=3, log_start=2)
    s.end("z", start=2)


def batch_trimmed_in_part(s: Story) -> None:
    s.acked(s.send("x", "y", "z"), 0, 1, count=3)
    s.trim(1, outcome="unknown")
    s.end("yz", start=1)


def groups_commit_and_resume(s: Story) -> None:
    s.three()
    s.read("xyz", end=3, group="g", asked=None)
    s.commit(1)
    s.commit(0, ignored=True)
    s.read("z", start=2, end=3, group="g", asked=None, committed=1)
    s.end("xyz", g=1)


def unknown_commit_that_happened(s: Story) -> None:
    s.three()
    s.commit(0)
    s.commit(2, outcome="unknown")
    s.end("xyz", g=2)


def unknown_commit_that_did_not(s: Story) -> None:
    s.three()
    s.commit(0)
    s.commit(2, outcome="unknown")
    s.end("xyz", g=0)


def read_beside_a_write(s: Story) -> None:
    read = s.begin_read()
    s.put("x", 0, 1)
    s.end_read(read, "", end=0)
    s.end("x")


def read_of_a_record_not_yet_acknowledged(s: Story) -> None:
    op = s.send("x")
    s.read("x", end=1)
    s.acked(op, 0, 1)
    s.end("x")


GOOD: list[Tale] = [
    plain, nothing, unknown_that_happened, unknown_that_did_not, never_answered, refused_and_absent, retry_with_one_effect,
    retry_that_was_the_first, refused_then_retried, same_value_sent_twice_without_key, reused_key_refused,
    concurrent_sends_any_order, second_of_two_at_once_wins, batch_in_one_stretch, unknown_batch_whole, batch_over_partitions,
    trimmed, batch_trimmed_in_part, groups_commit_and_resume, unknown_commit_that_happened, unknown_commit_that_did_not,
    read_beside_a_write, read_of_a_record_not_yet_acknowledged,
]  # fmt: skip


# -- bad ------------------------------------------------------------------------------------------------------------
def lost(s: Story) -> None:
    s.three()
    s.end("xy")


def lost_from_the_middle(s: Story) -> None:
    s.three()
    s.end("xz")


def moved(s: Story) -> None:
    s.three()
    s.end("xzy")


def in_another_partition(s: Story) -> None:
    s.acked(s.send("x", to=0), 0, 1, partition=1)
    s.end("")
    s.end("x", partition=1)


def two_reads_differ(s: Story) -> None:
    s.three()
    s.read("xyz", end=3)
    s.read("yxz", end=3)
    s.end("xyz")


def two_reads_of_trimmed_records_differ(s: Story) -> None:
    one, two = s.send("x"), s.send("y")
    s.read("x", end=2)
    s.read("y", end=2)
    s.acked(one, 0, 1)
    s.acked(two, 1, 1)
    s.trim(2)
    s.end("", start=2)


def stored_twice_by_a_retry(s: Story) -> None:
    s.unknown(s.send("x", key="k"))
    s.acked(s.send("x", key="k"), 1, 2)
    s.end("xx")


def stored_twice_by_nobody(s: Story) -> None:
    s.put("x", 0, 1)
    s.end("xx")


def new_twice(s: Story) -> None:
    s.acked(s.send("x", key="k"), 0, 1)
    s.acked(s.send("x", key="k"), 0, 1)
    s.end("x")


def duplicate_at_another_offset(s: Story) -> None:
    s.acked(s.send("x", key="k"), 0, 1)
    s.acked(s.send("x", key="k"), 1, 1, duplicate=True)
    s.trim(2)
    s.end("", start=2)


def refused_but_there(s: Story) -> None:
    s.refused(s.send("x"))
    s.end("x")


def refused_but_read(s: Story) -> None:
    op = s.send("x")
    s.read("x", end=1)
    s.refused(op)
    s.trim(1)
    s.end("", start=1)


def phantom(s: Story) -> None:
    s.put("x", 0, 1)
    s.end("xq")


def phantom_read(s: Story) -> None:
    s.put("x", 0, 1)
    s.read("q", end=1)
    s.trim(1)
    s.end("", start=1)


def dirty_read(s: Story) -> None:
    op = s.send("x")
    s.read("x", end=1)
    s.unknown(op)
    s.put("y", 0, 1)
    s.end("y")


def read_before_it_was_sent(s: Story) -> None:
    s.read("x", end=1)
    s.put("x", 0, 1)
    s.end("x")


def other_bytes(s: Story) -> None:
    mark, other = fingerprint(b"a1 hello"), fingerprint(b"a1 hellO")
    s.acked(s.send(mark), 0, 1)
    s.recorder.final(FinalPartition("t", 0, 0, 1, (other,)))


def gap(s: Story) -> None:
    s.three()
    s.end("xyz", high=4)


def page_skips(s: Story) -> None:
    s.three()
    op = s.begin_read(0)
    s.recorder.complete(op, "ok", result=Page(0, ("x",), 2, 3, 0))
    s.end("xyz")


def page_from_elsewhere(s: Story) -> None:
    s.three()
    s.read("yz", start=1, end=3, asked=0)
    s.end("xyz")


def offset_reused(s: Story) -> None:
    s.put("x", 0, 1)
    s.put("y", 0, 2)
    s.trim(1)
    s.end("", start=1)


def order_reversed(s: Story) -> None:
    s.put("x", 1, 1)
    s.unknown(s.send("y"))
    s.end("yx")


def batch_id_goes_back(s: Story) -> None:
    s.put("x", 0, 5)
    s.put("y", 1, 4)
    s.end("xy")


def batch_id_starts_again(s: Story) -> None:
    s.put("x", 0, 5)
    s.recorder.process("killed")
    s.put("y", 1, 5)
    s.end("xy")


def stale_end(s: Story) -> None:
    s.three()
    s.read("xy", end=2)
    s.end("xyz")


def end_goes_back(s: Story) -> None:
    s.three()
    s.read("xyz", end=5)
    s.end("xyz")


def batch_torn(s: Story) -> None:
    s.unknown(s.send("x", "y"))
    s.end("x")


def batch_interleaved(s: Story) -> None:
    s.unknown(s.send("x", "y"))
    s.put("z", 1, 1)
    s.end("xzy")


def batch_reordered(s: Story) -> None:
    s.acked(s.send("x", "y"), 0, 1, count=2)
    s.end("yx")


def batch_torn_over_partitions(s: Story) -> None:
    s.unknown(s.recorder.invoke("a", Produce("t", (Sent("x", 0), Sent("y", 1)), "k")))
    s.end("x")
    s.end("", partition=1)


def commit_lost(s: Story) -> None:
    s.three()
    s.commit(1)
    s.end("xyz")


def commit_went_back(s: Story) -> None:
    s.three()
    s.commit(0)
    s.commit(2)
    s.read("", start=3, end=3, group="g", asked=None, committed=2)
    s.end("xyz", g=0)


def commit_seen_to_go_back(s: Story) -> None:
    s.three()
    s.commit(0)
    s.commit(2, outcome="unknown")
    s.read("", start=3, end=3, group="g", asked=None, committed=2)
    s.read("yz", start=1, end=3, group="g", asked=None, committed=0)
    s.end("xyz", g=2)


def commit_beyond_the_end(s: Story) -> None:
    s.three()
    s.commit(3)
    s.end("xyz", g=3)


def commit_from_nowhere(s: Story) -> None:
    s.three()
    s.commit(0)
    s.end("xyz", g=1)


def refused_commit_holds(s: Story) -> None:
    s.three()
    s.commit(2, outcome="refused")
    s.end("xyz", g=2)


def group_resumes_elsewhere(s: Story) -> None:
    s.three()
    s.commit(0)
    s.read("z", start=2, end=3, group="g", asked=None, committed=0)
    s.end("xyz", g=0)


def claims_more(s: Story) -> None:
    op = s.send("x")
    s.recorder.complete(op, "ok", result=Receipt((RunReceipt(0, 0, 1),), 1, synced=None))
    s.end("x")


def claims_a_duplicate(s: Story) -> None:
    s.acked(s.send("x", key="k"), 0, 1, duplicate=True)
    s.end("x")


def claims_a_count(s: Story) -> None:
    s.acked(s.send("x", "y"), 0, 1, count=1)
    s.end("xy")


def no_batch_id(s: Story) -> None:
    s.put("x", 0, 0)
    s.end("x")


def trimmed_by_nobody(s: Story) -> None:
    s.three()
    s.trim(1)
    s.end("z", start=2)


def trimmed_came_back(s: Story) -> None:
    s.three()
    s.trim(2)
    s.end("xyz")


def log_start_goes_back(s: Story) -> None:
    s.three()
    s.trim(2, outcome="unknown")
    s.read("z", start=2, end=3, log_start=2)
    s.read("xyz", end=3)
    s.end("z", start=2)


BAD: list[tuple[str, Tale]] = [
    ("L1", lost), ("L1", lost_from_the_middle), ("L1", trimmed_by_nobody), ("L2", moved), ("L2", in_another_partition),
    ("L3", two_reads_differ), ("L3", two_reads_of_trimmed_records_differ), ("L4", stored_twice_by_a_retry),
    ("L4", stored_twice_by_nobody), ("L4", new_twice), ("L4", duplicate_at_another_offset), ("L5", refused_but_there),
    ("L5", refused_but_read), ("L6", phantom), ("L6", phantom_read), ("L6", dirty_read), ("L6", read_before_it_was_sent),
    ("L6", other_bytes), ("L7", gap), ("L7", page_skips), ("L7", page_from_elsewhere), ("L7", offset_reused),
    ("L8", order_reversed), ("L8", batch_id_goes_back), ("L8", batch_id_starts_again), ("L9", stale_end), ("L10", batch_torn),
    ("L10", batch_interleaved), ("L10", batch_reordered), ("L10", batch_torn_over_partitions), ("L11", commit_lost),
    ("L11", commit_went_back), ("L11", commit_seen_to_go_back), ("L11", commit_beyond_the_end), ("L11", commit_from_nowhere),
    ("L11", refused_commit_holds), ("L11", group_resumes_elsewhere), ("L14", claims_more), ("L14", claims_a_duplicate),
    ("L14", claims_a_count), ("L14", no_batch_id), ("L14", end_goes_back), ("T2", trimmed_came_back), ("T2", log_start_goes_back),
]  # fmt: skip
