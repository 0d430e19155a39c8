"""The edge from the source: what is shed is named, in order, and nothing is held back by it."""

import os
import threading
import time

import numpy as np
import pytest

from pipeline.component import Source
from pipeline.errors import PipelineError, Unavailable
from pipeline.messages import Dropped, Frame, FrameInfo, Malformed
from pipeline.numbering import Position
from pipeline.runtime.inlet import Inlet, Intake, Overrun, Shed, Taken


class Quick(Source):
    """Gives its frames at once, then ends, or fails."""

    def __init__(self, frames=10, failure=None):
        self._frames, self._failure = frames, failure
        self.given = threading.Event()

    @classmethod
    def build(cls, config, sensor):
        return cls()

    def frames(self):
        for seq in range(self._frames):
            yield Frame(FrameInfo(seq, "s", 0, "utc", (1, 1)), np.zeros((1, 1), np.uint8))
        self.given.set()
        if self._failure:
            raise self._failure


@pytest.fixture
def wake():
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    for thread in threading.enumerate():
        if thread.name == "source":  # it writes once more when it ends
            thread.join(20)
    os.close(descriptor)


def make(source, wake, queue=3, overflow="drop-oldest", max_age_ns=None, taken=0):
    intake = Intake(taken=taken)
    inlet = Inlet(
        lambda: source, queue, overflow=overflow, max_age_ns=max_age_ns, intake=intake, wake=wake
    )
    inlet.open()
    return inlet, intake


def everything(inlet):
    items = []
    deadline = time.monotonic() + 20
    while not inlet.ended:
        assert time.monotonic() < deadline
        if (item := inlet.take(granted=True)) is not None:
            items.append(item)
    return items


def test_the_oldest_are_shed_as_one_range_and_the_newest_kept(wake):
    source = Quick(1000)
    inlet, intake = make(source, wake)
    assert source.given.wait(20)
    items = everything(inlet)
    assert items[0] == Shed(0, 997, "overload: oldest frame shed")
    assert [item.frame.info.seq for item in items[1:]] == [997, 998, 999]
    assert intake.taken == 1000


class Numbered(Quick):
    """One whose sender numbers from 40."""

    position = Position(40, 0)

    def resume(self, position):
        self.position = position
        return True


@pytest.mark.parametrize(("kind", "flags"), [(Quick, ("restarted",)), (Numbered, ())])
def test_the_first_frame_after_a_front_died_tells_if_losses_are_not_known(wake, kind, flags):
    inlet, intake = make(kind(2), wake)
    everything(inlet)
    source = kind(2)
    inlet = Inlet(lambda: source, 3, overflow="block", max_age_ns=None, intake=intake, wake=wake)
    inlet.open()
    infos = [item.frame.info for item in everything(inlet)]
    assert [(info.seq, info.flags) for info in infos] == [(2, flags), (3, ())]
    if kind is Numbered:
        assert source.position == Position(42, 0)
        assert intake.position == Position(40, 0)


class Returned(Source):
    """One whose sender has begun anew, after losses."""

    @classmethod
    def build(cls, config, sensor):
        return cls()

    def frames(self):
        yield from (Dropped(seq, "source", "missing") for seq in range(30))
        for seq in range(30, 35):
            flags = ("restarted",) if seq == 30 else ()
            yield Frame(FrameInfo(seq, "s", 0, "utc", (1, 1), flags), np.zeros((1, 1), np.uint8))


def test_what_is_lost_takes_no_room_and_a_frame_that_is_shed_hands_on_its_flag(wake):
    inlet, _ = make(Returned(), wake)
    while not inlet._ended:
        time.sleep(0.01)
    items = everything(inlet)
    assert items[:2] == [Shed(0, 30, "missing"), Shed(30, 32, "overload: oldest frame shed")]
    infos = [item.frame.info for item in items[2:]]
    assert [(i.seq, i.flags) for i in infos] == [(32, ("restarted",)), (33, ()), (34, ())]


def test_a_flag_that_nobody_has_seen_outlives_its_front(wake):
    inlet, intake = make(Returned(), wake, queue=5)
    while not inlet._ended:
        time.sleep(0.01)
    assert inlet.take(granted=False) == Shed(0, 30, "missing")
    inlet.close()  # the flagged frame waits in it
    source = Numbered(2)
    intake.note(source.position)
    after = Inlet(lambda: source, 3, overflow="block", max_age_ns=None, intake=intake, wake=wake)
    after.open()
    flags = [item.frame.info.flags for item in everything(after)]
    assert flags == [("restarted",), ()]
    assert not intake.restarted


def test_very_many_losses_are_held_back(wake, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.inlet.MAX_LOSSES", 10)
    inlet, intake = make(Returned(), wake, overflow="fail", queue=5)
    time.sleep(0.3)
    assert intake.taken == 15
    items = everything(inlet)
    assert sum(item.end - item.first for item in items if isinstance(item, Shed)) == 30
    assert inlet.failure is None


def test_what_is_lost_is_no_overrun(wake):
    inlet, _ = make(Returned(), wake, queue=5, overflow="fail")
    everything(inlet)
    assert inlet.failure is None


def test_a_source_that_is_held_back_loses_nothing(wake):
    inlet, _ = make(Quick(200), wake, overflow="block")
    assert [item.frame.info.seq for item in everything(inlet)] == list(range(200))


def test_losses_are_told_while_no_frame_may_be_sent(wake):
    source = Quick()
    inlet, _ = make(source, wake)
    assert source.given.wait(20)
    assert isinstance(inlet.take(granted=False), Shed)
    assert inlet.take(granted=False) is None
    assert isinstance(inlet.take(granted=True), Taken)


def test_frames_that_have_waited_too_long_are_shed(wake):
    source = Quick(2)
    inlet, _ = make(source, wake, max_age_ns=1_000_000)
    assert source.given.wait(20)
    time.sleep(0.01)
    assert inlet.take(granted=True) == Shed(0, 2, "older than 1 ms")


def test_numbers_go_on_where_a_front_before_this_one_left_off(wake):
    inlet, intake = make(Quick(3), wake, overflow="block", taken=40)
    assert [item.frame.info.seq for item in everything(inlet)] == [40, 41, 42]
    assert intake.taken == 43


def test_a_run_that_must_not_shed_fails_instead(wake):
    inlet, _ = make(Quick(), wake, overflow="fail")
    deadline = time.monotonic() + 20
    while inlet.failure is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [item.frame.info.seq for item in everything(inlet)] == [0, 1, 2]
    assert isinstance(inlet.failure, Overrun)


def test_a_source_that_fails_gives_its_frames_first(wake):
    inlet, _ = make(Quick(3, ValueError("unplugged")), wake)
    assert [item.frame.info.seq for item in everything(inlet)] == [0, 1, 2]
    assert str(inlet.failure) == "unplugged"


def test_a_stopped_inlet_ends_though_its_source_does_not(wake):
    let_go = threading.Event()

    class Endless(Quick):
        def frames(self):
            yield from super().frames()
            assert let_go.wait(60)

    inlet, _ = make(Endless(2), wake)
    time.sleep(0.2)
    inlet.stop()
    assert len(everything(inlet)) == 2
    let_go.set()  # else every test's end would wait for its thread


class Gapped(Quick):
    """Knows that every third of its frames was lost."""

    def frames(self):
        for frame in super().frames():
            seq = frame.info.seq
            yield Dropped(seq, "source", "feed: missing") if seq % 3 == 1 else frame


@pytest.mark.parametrize("overflow", ["block", "drop-oldest"])
def test_what_the_source_lost_keeps_its_place_and_reason(wake, overflow):
    source = Gapped(9)
    inlet, intake = make(source, wake, queue=3, overflow=overflow, taken=40)
    if overflow == "drop-oldest":
        assert source.given.wait(20)
    items = everything(inlet)
    told = [(i.first, i.end, i.reason) if isinstance(i, Shed) else i.frame.info.seq for i in items]
    shed, missing = "overload: oldest frame shed", "feed: missing"
    late = [45, 46, (47, 48, missing), 48]
    if overflow == "block":
        assert told == [40, (41, 42, missing), 42, 43, (44, 45, missing), *late]
    else:
        losses = [(40, 41, shed), (41, 42, missing), (42, 44, shed), (44, 45, missing)]
        assert told == [*losses, *late]
    assert intake.taken == 49


# --- a source that fails -------------------------------------------------------------------------


def reader(open_source, wake, monkeypatch, *, live=True, taken=0):
    monkeypatch.setattr("pipeline.runtime.inlet.FIRST_RETRY_S", 0.01)
    inlet = Inlet(
        open_source, 100, overflow="block", max_age_ns=10**12 if live else None,
        intake=Intake(taken=taken), wake=wake,
    )  # fmt: skip
    inlet.open()
    return inlet


def one_after_another(*sources):
    """Opens the next each time; an error is raised in its place."""
    left = iter(sources)

    def open_source():
        if isinstance(found := next(left), Exception):
            raise found
        return found

    return open_source


def test_a_source_that_is_away_is_opened_until_it_is_there_and_numbers_go_on(
    wake, monkeypatch, caplog
):
    away = Unavailable("camera x: no answer")
    found = one_after_another(away, away, Quick(2, OSError("unplugged")), away, Quick(3))
    inlet = reader(found, wake, monkeypatch, taken=7)
    assert [item.frame.info.seq for item in everything(inlet)] == [7, 8, 9, 10, 11]
    assert inlet.failure is None
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "source: camera x: no answer; it is opened again in 0.01 s",
        "source: camera x: no answer; it is opened again in 0.02 s",
        "source: OSError: unplugged; it is opened again in 0.01 s",
        "source: camera x: no answer; it is opened again in 0.02 s",
    ]


@pytest.mark.parametrize(
    ("failure", "live", "taken"),
    [
        (PipelineError("no such format"), True, 0),
        (Unavailable("away"), False, 0),
        (OSError("unplugged"), False, 5),
    ],
)
def test_what_is_wrong_from_the_start_or_fails_in_replay_is_final(
    wake, monkeypatch, failure, live, taken
):
    inlet = reader(one_after_another(failure), wake, monkeypatch, live=live, taken=taken)
    assert everything(inlet) == []
    assert inlet.failure is failure


def test_what_was_right_once_is_tried_again_whatever_it_says(wake, monkeypatch):
    found = one_after_another(PipelineError("no such format"), Quick(1))
    inlet = reader(found, wake, monkeypatch, taken=1)
    assert [item.frame.info.seq for item in everything(inlet)] == [1]


def test_an_inlet_that_waits_for_its_source_stops_at_once(wake, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.inlet.FIRST_RETRY_S", 60.0)
    tried = threading.Event()

    def open_source():
        tried.set()
        raise Unavailable("away")

    inlet = Inlet(
        open_source, 3, overflow="drop-oldest", max_age_ns=10**9, intake=Intake(), wake=wake
    )
    inlet.open()
    assert tried.wait(20)
    began = time.monotonic()
    inlet.close()
    assert time.monotonic() - began < 5.0
    assert inlet.ended


# --- what is no frame ----------------------------------------------------------------------------


class Garbled(Quick):
    """Frames, and between them what is none: of some the bytes, of others only that it was."""

    def frames(self):
        for frame in super().frames():
            seq = frame.info.seq
            if seq % 5 == 0:
                yield frame
            else:
                yield Malformed(seq, "source", "feed: no header", (b"x",) if seq % 5 == 3 else ())


def test_what_was_malformed_is_told_as_such_with_its_bytes(wake):
    source = Garbled(10)
    inlet, _ = make(source, wake, queue=20)
    assert source.given.wait(20)
    shed = [item for item in everything(inlet) if isinstance(item, Shed)]
    assert [(one.first, one.end, one.parts) for one in shed] == [
        (1, 3, ()), (3, 5, (b"x",)), (6, 8, ()), (8, 10, (b"x",)),
    ]  # fmt: skip
    assert all(one.malformed for one in shed)


def test_how_many_wait_is_seen_from_outside(wake):
    source = Quick(10)
    inlet, intake = make(source, wake, queue=4)
    assert source.given.wait(20)
    seen = [intake.waiting]
    while not inlet.ended:
        inlet.take(granted=True)
        seen.append(intake.waiting)
    assert seen == [4, 4, 3, 2, 1, 0]
