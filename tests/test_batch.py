"""Frames done at once: how long one waits for others, and that each still answers for itself."""

from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from types import SimpleNamespace

import pytest
from conftest import assert_one_line_error

from pipeline.component import Stage
from pipeline.config import load_config, open_source
from pipeline.messages import Dropped, Trace
from pipeline.runtime.batch import Batch
from pipeline.runtime.dispatch import Dispatcher
from pipeline.runtime.flow import Flow, Work
from pipeline.runtime.supervisor import Supervisor
from pipeline.runtime.topology import Node

MS = 1_000_000


def work(seq, t_ingest_ms=0):
    return Work(Message(seq), Trace(t_ingest_ms * MS, {"front": 1}))


@dataclass(frozen=True)
class Message:
    """As much of one as a flow looks at."""

    seq: int
    done: tuple[str, ...] = ()

    @property
    def info(self):
        return SimpleNamespace(seq=self.seq)


def filled(batch, now_ms, *works):
    for each in works:
        batch.add(each, now_ms * MS)
    return batch


# --- how long is waited --------------------------------------------------------------------------


def test_a_full_batch_is_due_at_once_and_a_single_frame_never_waits():
    assert filled(Batch(1, 50 * MS, None), 0, work(0)).is_due(0)
    batch = filled(Batch(2, 50 * MS, None), 0, work(0))
    assert not batch.is_due(0)
    assert filled(batch, 1, work(1)).is_due(1 * MS)
    assert [each.message.seq for each in batch.take()] == [0, 1]
    assert len(batch) == 0 and not batch.is_due(10**12)


def test_the_first_frame_waits_no_longer_than_it_may():
    batch = filled(Batch(4, 5 * MS, None), 100, work(0, 90))
    assert batch.wait_ms(100 * MS, 100) == 5
    filled(batch, 104, work(1, 101))
    assert batch.wait_ms(104 * MS, 100) == 1, "the second does not begin the wait anew"
    assert not batch.is_due(104 * MS) and batch.is_due(105 * MS)
    assert batch.wait_ms(200 * MS, 100) == 0


def test_no_frame_waits_into_what_its_deadline_leaves_for_the_rest():
    batch = filled(Batch(4, 50 * MS, 20 * MS), 30, work(0, 15))
    assert batch.wait_ms(30 * MS, 100) == 5, "it came in at 15 and must be begun by 35"
    late = filled(Batch(4, 50 * MS, 20 * MS), 40, work(0, 15))
    assert late.is_due(40 * MS)
    filled(batch, 31, work(1, 12))
    assert batch.wait_ms(31 * MS, 100) == 1, "one that came in earlier hurries the others"


def test_what_a_deadline_leaves_is_told_by_the_budgets_of_the_table():
    table = (
        Node("front", (), budget_ms=9.0),
        Node("unmix", (), batch=3, batch_ms=80.0, budget_ms=6.0),
        Node("back", (), budget_ms=4.0),
        Node("yolo", (), budget_ms=100.0, beside=True),
    )
    batch = filled(Batch.live(table, 1, 100 * MS), 0, work(0))
    assert batch.is_due(80 * MS) and not batch.is_due(79 * MS)
    batch = filled(Batch.live(table, 1, 50 * MS), 0, work(0))
    assert batch.is_due(40 * MS) and not batch.is_due(39 * MS)


def test_without_work_the_wait_is_the_nodes_own():
    assert Batch(4, 50 * MS, None).wait_ms(0, 100) == 100


# --- what is done with it ------------------------------------------------------------------------


class Together(Stage[Message, Message]):
    """Does all at once; fails as a whole if a frame of it cannot be done."""

    def __init__(self, bad=()):
        self.bad, self.calls = bad, []

    def process(self, message):
        self.calls.append((message.seq,))
        if message.seq in self.bad:
            raise ValueError(f"cannot do {message.seq}")
        return Message(message.seq, (*message.done, "together"))

    def process_all(self, messages):
        self.calls.append(tuple(message.seq for message in messages))
        if any(message.seq in self.bad for message in messages):
            raise ValueError("cannot do all")
        return [Message(message.seq, (*message.done, "together")) for message in messages]


def run_flow(stage, *works):
    ticks = iter(range(0, 10_000, 7))
    return Flow([("first", stage), ("second", Together())], ticks.__next__).process_all(works)


def test_a_stage_is_given_all_frames_at_once_and_each_keeps_its_own_trace():
    stage = Together()
    results = run_flow(stage, work(4, 1), work(5, 2))
    assert stage.calls == [(4, 5)]
    assert [message.done for message, _ in results] == [("together", "together")] * 2
    assert [trace.t_ingest_ns for _, trace in results] == [1 * MS, 2 * MS]
    assert [trace.stage_ns for _, trace in results] == [{"front": 1, "first": 7, "second": 7}] * 2


def test_a_frame_that_cannot_be_done_costs_no_other_of_its_batch():
    stage = Together(bad=(5,))
    results = run_flow(stage, work(4), work(5), work(6))
    assert stage.calls == [(4, 5, 6), (4,), (5,), (6,)]
    assert results[1][0] == Dropped(5, "first", "cannot do 5")
    assert [results[n][0].seq for n in (0, 2)] == [4, 6]
    assert all(results[n][0].done == ("together", "together") for n in (0, 2))


def test_one_frame_is_not_tried_twice():
    stage = Together(bad=(5,))
    ((dropped, _),) = run_flow(stage, work(5))
    assert dropped == Dropped(5, "first", "cannot do 5")
    assert stage.calls == [(5,)]


def test_a_live_node_does_frames_together_and_publishes_each_in_order(scene_recording, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("topology: {unmix: {batch: 4, batch_ms: 60}}\n")
    source = {"kind": "loop", "path": str(scene_recording), "phases": [(2.0, 60.0)]}
    loaded = load_config(config, source=source)
    opened = open_source(loaded)
    with Supervisor(loaded, "live", opened.sensor, opened.shape) as supervisor:
        messages = list(supervisor.messages())
    opened.close()
    assert [m["frame_seq"] for m in messages if "frame_seq" in m] == list(range(120))
    published = [m for m in messages if m["schema"] == "irst.targets/1"]
    assert messages[-1]["published"] == len(published) > 20
    took = Counter(m["stage_ns"]["unmix"] for m in published)
    assert max(took.values()) == 4, "frames done at once took the same time"
    assert len(took) < len(published) / 2


# --- who is to blame -----------------------------------------------------------------------------


def ledger(batch=3):
    front, unmix = Node("front", ()), Node("unmix", (), queue=8, batch=batch)
    dispatcher = Dispatcher((front, unmix), 10_000 * MS)
    for seq in range(8):
        dispatcher.take(seq, 0, [b"raw"])
    return dispatcher


def test_a_worker_holds_a_batch_and_the_next():
    dispatcher = ledger()
    dispatcher.ready(b"unmix.0#1", 1)
    assert [job.seq for _, job in dispatcher.assign()] == [0, 1, 2, 3, 4, 5]


def test_the_frame_that_kills_is_found_among_those_of_its_batch():
    dispatcher, deadly, done = ledger(), 1, []
    for number in range(10):
        worker = b"unmix.0#%d" % number
        dispatcher.ready(worker, 1)
        held = [job for _, job in dispatcher.assign()]
        while held:
            # As a node does: one that comes again is done by itself.
            together = list(takewhile(lambda job: not job.deaths, held[:3])) or held[:1]
            if any(job.seq == deadly for job in together):
                dispatcher.gone(worker)
                break
            for job in together:
                held.remove(job)
                dispatcher.forward(dispatcher.answer(worker, job.seq), [b"done"])
                done.append(job.seq)
            held += [job for _, job in dispatcher.assign()]
        else:
            break
    lost = [outcome for outcome in dispatcher.outcomes if isinstance(outcome, Dropped)]
    assert lost == [Dropped(deadly, "unmix", "its worker died 2 times")]
    assert sorted(done) == [0, 2, 3, 4, 5, 6, 7]


def test_the_front_does_frames_as_they_come(command, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("topology: {front: {batch: 2}}\n")
    assert_one_line_error(command("pipeline", "check", "--config", config), "front.batch")


@pytest.mark.parametrize("batch", [0, 257])
def test_a_batch_has_its_limits(command, tmp_path, batch):
    config = tmp_path / "config.yaml"
    config.write_text(f"topology: {{unmix: {{batch: {batch}}}}}\n")
    assert_one_line_error(command("pipeline", "check", "--config", config), "topology.unmix")
