"""The ledger: whatever happens to workers, each frame has exactly one outcome."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RunError
from pipeline.messages import Dropped
from pipeline.runtime.dispatch import HELD_BY_WORKER, Dispatcher, Job
from pipeline.runtime.topology import Node

MS = 1_000_000
EVENTS = st.lists(
    st.tuples(st.sampled_from(["take", "shed", "work", "die", "late", "wait"]), st.integers(0, 3)),
    max_size=120,
)


def table(overflow="block", replicas=2, queue=2):
    return (
        Node("front", ()),
        Node("unmix", (), replicas, queue, overflow),
        Node("back", (), 1, 2, overflow),
    )


def play(dispatcher, events):
    """Drive a ledger through any events, then to the end; returns the workers' answers."""
    workers = {1: [b"unmix.0#1", b"unmix.1#1"], 2: [b"back.0#1"]}
    for row, names in workers.items():
        for name in names:
            dispatcher.ready(name, row)
    granted, now, number = 0, 0, 1
    given_out: list[tuple[bytes, Job]] = []
    for event, which in [*events, *[("work", n % 4) for n in range(400)]]:
        granted += dispatcher.grant()
        seq = dispatcher.next_in
        if event == "take" and granted:
            granted -= 1
            dispatcher.take(seq, now, [b"raw"])
        elif event == "shed":
            dispatcher.lose(seq, seq + which, "source", "shed")
        elif event == "work" and given_out:
            worker, job = given_out.pop(which % len(given_out))
            if (mine := dispatcher.answer(worker, job.seq)) is not None:
                dispatcher.forward(mine, [b"done"])
        elif event == "die":
            row = 1 + which % 2
            name = workers[row].pop(0)
            dispatcher.gone(name)
            number += 1
            workers[row].append(name.split(b"#")[0] + b"#%d" % number)
            dispatcher.ready(workers[row][-1], row)
        elif event == "late" and given_out:
            dispatcher.answer(b"stranger", given_out[0][1].seq)
        elif event == "wait":
            now += which * 300 * MS
            dispatcher.expire(now)
        given_out += list(dispatcher.assign())
    return seq


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.sampled_from(["block", "drop-oldest"]), st.sampled_from([None, 1000 * MS]))
def test_each_frame_has_one_outcome_whatever_dies_when(events, overflow, max_age_ns):
    dispatcher = Dispatcher(table(overflow), max_age_ns)
    play(dispatcher, events)
    dispatcher.give_up_all("over")
    outcomes = sorted(outcome.seq for outcome in dispatcher.outcomes)
    assert outcomes == list(range(dispatcher.next_in))
    done = [outcome for outcome in dispatcher.outcomes if isinstance(outcome, Job)]
    assert all(job.parts == [b"done"] and job.row == 3 for job in done)


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_queues_stay_within_their_limits(events):
    dispatcher = Dispatcher(table(), None)
    play(dispatcher, events)
    assert dispatcher.depths()["back"][0] <= 2 + 2 * HELD_BY_WORKER


def taken(dispatcher, frames, now=0):
    for seq in range(frames):
        dispatcher.take(seq, now, [b"raw"])


def test_what_a_dead_worker_held_is_done_next_and_in_order():
    dispatcher = Dispatcher(table(replicas=1, queue=4), 1000 * MS)
    dispatcher.ready(b"unmix.0#1", 1)
    taken(dispatcher, 4)
    assert [job.seq for _, job in dispatcher.assign()] == [0, 1]
    dispatcher.gone(b"unmix.0#1")
    dispatcher.ready(b"unmix.0#2", 1)
    assert [job.seq for _, job in dispatcher.assign()] == [0, 1]
    assert dispatcher.answer(b"unmix.0#1", 0) is None, "its last words came too late"


def test_a_frame_that_kills_its_workers_is_given_up_by_name():
    dispatcher = Dispatcher(table(replicas=1, queue=4), 1000 * MS)
    taken(dispatcher, 2)
    for number in range(2):
        name = b"unmix.0#%d" % number
        dispatcher.ready(name, 1)
        list(dispatcher.assign())
        dispatcher.gone(name)
    assert list(dispatcher.outcomes) == [Dropped(0, "unmix", "its worker died 2 times")]
    assert len(dispatcher) == 1, "the one behind it had no part in that"


def test_a_full_edge_does_what_its_policy_says():
    shedding = Dispatcher(table("drop-oldest", replicas=1), 1000 * MS)
    taken(shedding, 4)
    assert list(shedding.outcomes) == [
        Dropped(seq, "unmix", "overload: oldest frame shed") for seq in (0, 1)
    ]
    blocking = Dispatcher(table("block", replicas=1), 1000 * MS)
    assert blocking.grant() == 2
    taken(blocking, 2)
    assert blocking.grant() == 0
    with pytest.raises(RunError, match=r"topology\.unmix\.overflow"):
        taken(Dispatcher(table("fail", replicas=1), 1000 * MS), 4)


def test_in_replay_every_edge_blocks():
    dispatcher = Dispatcher(table("fail", replicas=1), None)
    taken(dispatcher, 4)
    assert dispatcher.grant() == 0
    dispatcher.expire(10**18)
    assert not dispatcher.outcomes


def test_old_frames_are_given_up_wherever_they_are():
    dispatcher = Dispatcher(table(replicas=1, queue=4), 1000 * MS)
    dispatcher.ready(b"unmix.0#1", 1)
    taken(dispatcher, 3)
    list(dispatcher.assign())
    dispatcher.take(3, 900 * MS, [b"raw"])
    dispatcher.expire(1001 * MS)
    assert [outcome.seq for outcome in dispatcher.outcomes] == [0, 1, 2]
    assert {outcome.reason for outcome in dispatcher.outcomes} == {"older than 1000 ms"}
    assert dispatcher.answer(b"unmix.0#1", 0) is None


def test_numbers_the_front_leaves_out_are_named():
    dispatcher = Dispatcher(table(), 1000 * MS)
    dispatcher.take(2, 0, [b"raw"])
    dispatcher.end(5)
    assert [outcome.seq for outcome in dispatcher.outcomes] == [0, 1, 3, 4]


def test_what_was_begun_is_finished_by_the_workers_it_was_begun_by():
    front, unmix, back = table(replicas=2, queue=8)
    dispatcher = Dispatcher((front, unmix, replace(back, queue=16)), 1000 * MS)
    for worker, row in ((b"unmix.0#0", 1), (b"unmix.1#0", 1), (b"back.0#0", 2)):
        dispatcher.ready(worker, row)
    taken(dispatcher, 7)
    held = {job.seq: worker for worker, job in dispatcher.assign()}
    assert sorted(held) == [0, 1, 2, 3]
    dispatcher.gone(held[0])  # 0 waits again, the last one begun is 3
    first = dispatcher.supersede()
    assert first == max(seq for seq, worker in held.items() if worker != held[0]) + 1
    for worker, row in ((b"unmix.0#1", 1), (b"unmix.1#1", 1), (b"back.0#1", 2)):
        dispatcher.ready(worker, row)
    done: dict[int, set[bytes]] = {seq: set() for seq in range(7)}
    work = [(worker, seq) for seq, worker in held.items() if worker != held[0]]
    while dispatcher.superseding or len(dispatcher):
        work += [(worker, job.seq) for worker, job in dispatcher.assign()]
        worker, seq = work.pop(0)
        done[seq].add(worker[-1:])
        dispatcher.forward(dispatcher.answer(worker, seq), [b"done"])
    for seq, generations in done.items():
        assert generations == ({b"0"} if seq < first else {b"1"})
    assert len(dispatcher.outcomes) == 7


def test_where_the_old_workers_are_dead_the_new_ones_finish():
    dispatcher = Dispatcher(table(replicas=1, queue=4), 1000 * MS)
    dispatcher.ready(b"unmix.0#0", 1)
    taken(dispatcher, 3)
    list(dispatcher.assign())
    assert dispatcher.supersede() == 2
    dispatcher.gone(b"unmix.0#0")
    dispatcher.ready(b"unmix.0#1", 1)
    assert [job.seq for _, job in dispatcher.assign()] == [0, 1]
