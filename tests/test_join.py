"""The ledger of a flow with a node beside it: an answer may be lost, a frame never for its sake."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.messages import Dropped
from pipeline.runtime.join import Join
from pipeline.runtime.topology import Node

MS = 1_000_000
WORKERS = {1: b"unmix.0#1", 2: b"back.0#1", 3: b"yolo.0#1"}
TABLE = (
    Node("front", ("detect", "crop"), 1, 4, "drop-oldest"),
    Node("unmix", ("unmix",), 1, 4, "block"),
    Node("back", ("report", "fuse"), 1, 8, "block"),
    Node("yolo", ("recognise",), 1, 1, "drop-oldest", beside=True),
)


def ledger(live=True, without=()):
    join = Join(TABLE, 1000 * MS if live else None, 100 * MS if live else None)
    for row, worker in WORKERS.items():
        if row not in without:
            join.ready(worker, row)
    return join


def show_and_take(join, *seqs, now=0):
    for seq in seqs:
        join.show(seq, now, [b"pixels"])
        join.take(seq, now, [b"patches"])


def given_out(join):
    return {(worker, job.seq): job for worker, job in join.assign()}


def done(join, worker, seq, parts=(b"done",)):
    join.forward(join.answer(worker, seq), list(parts))


def outcomes(join):
    return [o if isinstance(o, Dropped) else (o.seq, o.beside) for o in join.outcomes]


def test_both_work_at_once_and_the_join_waits_for_both():
    join = ledger()
    show_and_take(join, 0)
    first = given_out(join)
    assert first[b"unmix.0#1", 0].parts == [b"patches"]
    assert first[b"yolo.0#1", 0].parts == [b"pixels"]
    done(join, b"unmix.0#1", 0)
    assert given_out(join) == {}
    done(join, b"yolo.0#1", 0, [b"boxes"])
    assert given_out(join)[b"back.0#1", 0].beside == [b"boxes"]
    done(join, b"back.0#1", 0)
    assert outcomes(join) == [(0, [b"boxes"])]
    assert len(join) == 0


def test_an_answer_that_comes_first_is_kept():
    join = ledger()
    show_and_take(join, 0)
    given_out(join)
    done(join, b"yolo.0#1", 0, [b"boxes"])
    assert given_out(join) == {}
    done(join, b"unmix.0#1", 0)
    assert given_out(join)[b"back.0#1", 0].beside == [b"boxes"]


def test_what_is_late_is_left_out_and_its_answer_forgotten():
    join = ledger()
    show_and_take(join, 0)
    given_out(join)
    done(join, b"unmix.0#1", 0)
    join.expire(99 * MS)
    assert given_out(join) == {}
    join.expire(101 * MS)
    assert given_out(join)[b"back.0#1", 0].beside == Dropped(0, "yolo", "older than 100 ms")
    assert join.answer(b"yolo.0#1", 0) is None
    assert not join._answers


def test_a_slow_node_sheds_its_frames_and_the_flow_goes_on():
    join = ledger()
    show_and_take(join, 0)
    given_out(join)
    show_and_take(join, 1)
    given_out(join)
    show_and_take(join, 2, 3)
    at_back = []
    for seq in range(4):
        at_back += [job for (worker, _), job in given_out(join).items() if worker == b"back.0#1"]
        done(join, b"unmix.0#1", seq)
    (job,) = at_back
    assert (job.seq, job.beside) == (2, Dropped(2, "yolo", "overload: oldest frame shed"))
    done(join, b"yolo.0#1", 0)
    assert (b"back.0#1", 0) in given_out(join)


def test_live_nobody_waits_for_a_node_that_is_not_there():
    join = ledger()
    show_and_take(join, 0, 1)
    given_out(join)
    join.gone(b"yolo.0#1")
    for seq in (0, 1):
        given_out(join)
        done(join, b"unmix.0#1", seq)
    reasons = {job.beside.reason for job in given_out(join).values()}
    assert reasons == {"node yolo is not ready"}
    join.ready(b"yolo.0#2", 3)
    show_and_take(join, 2)
    assert (b"yolo.0#2", 2) in given_out(join)


def test_in_replay_the_join_waits_until_the_node_is_there_again():
    join = ledger(live=False)
    show_and_take(join, 0)
    given_out(join)
    join.gone(b"yolo.0#1")
    done(join, b"unmix.0#1", 0)
    join.expire(10**15)
    assert given_out(join) == {}
    join.ready(b"yolo.0#2", 3)
    assert set(given_out(join)) == {(b"yolo.0#2", 0)}
    join.gone(b"yolo.0#2")
    (job,) = given_out(join).values()
    assert job.beside == Dropped(0, "yolo", "its worker died 2 times")


def test_a_back_node_that_dies_gives_frame_and_answer_to_the_next():
    join = ledger()
    show_and_take(join, 0)
    given_out(join)
    done(join, b"unmix.0#1", 0)
    done(join, b"yolo.0#1", 0, [b"boxes"])
    given_out(join)
    join.gone(b"back.0#1")
    join.ready(b"back.0#2", 2)
    assert given_out(join)[b"back.0#2", 0].beside == [b"boxes"]


def test_an_answer_nobody_waits_for_any_more_is_forgotten():
    join = ledger()
    show_and_take(join, 0)
    jobs = given_out(join)
    done(join, b"yolo.0#1", 0)
    join.give_up(jobs[b"unmix.0#1", 0], "lost", "unmix")
    given_out(join)
    assert outcomes(join) == [Dropped(0, "unmix", "lost")]
    assert not join._answers


def test_a_malformed_answer_costs_the_answer_only():
    join = ledger()
    show_and_take(join, 0)
    given_out(join)
    done(join, b"unmix.0#1", 0)
    job = join.answer(b"yolo.0#1", 0)
    assert join.node_of(job) == "yolo"
    join.give_up(job, "malformed message: x", "transport")
    assert given_out(join)[b"back.0#1", 0].beside.reason == "malformed message: x"
    assert outcomes(join) == []


def test_a_frame_that_was_not_shown_is_not_waited_for():
    join = ledger()
    join.take(0, 0, [b"patches"])
    given_out(join)
    done(join, b"unmix.0#1", 0)
    assert given_out(join)[b"back.0#1", 0].beside == Dropped(0, "yolo", "was not asked")


def test_it_supersedes_workers_of_both():
    join = ledger()
    show_and_take(join, 0)
    given_out(join)
    assert join.supersede() == 1 and join.superseding
    join.ready(b"yolo.0#2", 3)
    show_and_take(join, 1)
    given = {worker for worker, _ in given_out(join)}
    assert b"yolo.0#2" in given and b"yolo.0#1" not in given
    done(join, b"yolo.0#1", 0)
    assert set(join.depths()) == {"unmix", "back", "yolo"}


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["frame", "shed", "work", "die", "stall", "wait"]), st.integers(0, 3)
    ),
    max_size=100,
)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS)
def test_every_frame_has_one_outcome_whatever_happens_beside(events):
    join, names, now, number = ledger(), dict(WORKERS), 0, 1
    held, stalled = [], set()
    for event, which in [*events, *[("work", 0)] * 400]:
        seq = join.next_in
        if event == "frame":
            show_and_take(join, seq, now=now)
        elif event == "shed":
            join.lose(seq, seq + which, "source", "shed")
        elif event == "work" and held:
            worker, number_of = held.pop(which % len(held))
            if worker not in stalled and (job := join.answer(worker, number_of)) is not None:
                join.forward(job, [b"done"])
        elif event in ("die", "stall"):
            row = 1 + which % 3
            if event == "stall" and row == 3:
                stalled.add(names[3])
            else:
                join.gone(names[row])
                number += 1
                names[row] = names[row].split(b"#")[0] + b"#%d" % number
                join.ready(names[row], row)
        elif event == "wait":
            now += which * 40 * MS
            join.expire(now)
        held += [(worker, job.seq) for worker, job in join.assign()]
    now += 2000 * MS
    join.expire(now)
    list(join.assign())
    seqs = [o.seq for o in join.outcomes]
    assert sorted(seqs) == list(range(join.next_in))
    assert len(join) == 0
    assert not join._answers


def test_both_ledgers_change_at_one_frame():
    join = ledger()
    for seq in range(2):
        show_and_take(join, seq)
        given_out(join)
    done(join, b"unmix.0#1", 0)  # unmixing has begun 0 and 1, and so has the detector
    first = join.supersede()
    assert first == 2
    join.ready(b"yolo.0#2", 3)
    show_and_take(join, 2)
    given = {seq: worker for worker, seq in given_out(join) if worker.startswith(b"yolo")}
    assert given == {2: b"yolo.0#2"}


def test_a_frame_only_the_detector_has_begun_is_finished_by_the_old_ones():
    join = ledger()
    join.show(0, 0, [b"frame"])
    given_out(join)
    assert join.supersede() == 1  # the front has shown it, and not cut its patches yet
