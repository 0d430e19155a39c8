"""What each fault of a node costs: real processes, replayed over real sockets."""

import errno
import json
import multiprocessing.popen_spawn_posix
import os
from pathlib import Path

import faulty_nodes
import msgpack
import pytest
from conftest import assert_one_line_error

from pipeline.config import load_config, open_source
from pipeline.errors import PipelineError
from pipeline.live import replay_dead_letter
from pipeline.runtime import replay
from pipeline.runtime.dead_letters import LETTERS_PER_S, DeadLetters, read_letter, replay_letter
from pipeline.runtime.settings import DeadLetterSettings
from pipeline.runtime.supervisor import Supervisor
from pipeline.transport.hub import Word


@pytest.fixture
def config(scene_recording, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"source: {{kind: zarr_recording, path: {scene_recording}}}\n"
        "supervisor: {stall_s: 3}\n"
        f"dead_letters: {{folder: {tmp_path / 'letters'}}}\n"
    )
    return load_config(file)


def played(config):
    """Messages of a replay by nodes with a fault; every number must come once, in order."""
    source = open_source(config)
    with Supervisor(config, "replay", source.sensor, source.shape) as supervisor:
        messages = list(supervisor.messages())
        restarts = supervisor._children.restarts.total()
    source.close()
    numbers = [message["frame_seq"] for message in messages if "frame_seq" in message]
    assert numbers == list(range(12))
    end = messages[-1]
    assert end["frames_in"] == 12 == end["published"] + sum(e["frames"] for e in end["dropped"])
    return messages, restarts


def gaps(messages):
    return [message for message in messages if message["schema"] == "irst.gap/1"]


def targets(messages):
    timing = ("stage_ns", "age_ns")
    found = [message for message in messages if message["schema"] == "irst.targets/1"]
    return [{k: v for k, v in message.items() if k not in timing} for message in found]


@pytest.mark.parametrize(
    "entry", [faulty_nodes.dying_once, faulty_nodes.hanging_once, faulty_nodes.mute_once]
)
def test_a_node_that_dies_or_hangs_costs_no_frame(config, entry, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.supervisor.run_node", entry)
    messages, restarts = played(config)
    assert restarts == 1
    assert gaps(messages) == []
    source = open_source(config)
    expected = list(replay.in_process(config, source))
    assert targets(messages) == targets(expected)


def test_a_process_the_machine_has_no_room_for_is_started_later(config, monkeypatch, caplog):
    launch, refused = multiprocessing.popen_spawn_posix.Popen._launch, []

    def launched(self, process):
        if process.name == "unmix.0" and not refused:
            refused.append(process)
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        launch(self, process)

    monkeypatch.setattr(multiprocessing.popen_spawn_posix.Popen, "_launch", launched)
    messages, restarts = played(config)
    assert (restarts, gaps(messages)) == (1, [])
    assert "not started: Resource temporarily unavailable; restarting" in caplog.text


def test_live_too_a_worker_that_never_answers_a_frame_given_up_long_ago_is_replaced(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.runtime.supervisor.run_node", faulty_nodes.mute_once)
    file = tmp_path / "config.yaml"
    file.write_text(
        "source: {kind: synthetic, rate_hz: 20, width: 160, height: 128, groups: 2}\n"
        "supervisor: {stall_s: 2, max_age_ms: 500}\n"
        "publish: {heartbeat_s: 3600}\n"
    )
    config = load_config(file)
    source = open_source(config)
    with Supervisor(config, "live", source.sensor, source.shape) as supervisor:
        messages = []
        for message in supervisor.messages():
            messages.append(message)
            if supervisor._children.restarts and len(targets(messages)) > 20:
                supervisor.stop()
        assert supervisor._children.restarts == {"unmix.0": 1}
    numbers = [message["frame_seq"] for message in messages if "frame_seq" in message]
    assert numbers == list(range(messages[-1]["frames_in"]))
    given_up = {gap["frame_seq"]: gap["reason"] for gap in gaps(messages)}
    assert given_up[3] == "older than 500 ms"


@pytest.mark.parametrize("entry", [faulty_nodes.dying, faulty_nodes.babbling])
def test_a_frame_that_undoes_every_node_is_dropped_and_the_rest_goes_on(config, entry, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.supervisor.run_node", entry)
    messages, restarts = played(config)
    assert restarts == 2
    (gap,) = gaps(messages)
    assert (gap["frame_seq"], gap["stage"]) == (3, "unmix")
    assert "died 2 times" in gap["reason"]


def test_frames_the_front_cannot_do_are_lost_by_name_and_hold_up_no_other(config, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.supervisor.run_node", faulty_nodes.stumbling)
    messages, _ = played(config)
    lost = [(gap["frame_seq"], gap["stage"], gap["reason"]) for gap in gaps(messages)]
    assert lost == [(number, "detect", "odd") for number in range(1, 12, 2)]


APART = "topology: {unmix: {stages: [unmix]}, back: {stages: [report]}}\n"


@pytest.mark.parametrize(
    ("more", "where", "kind"),
    [("", "the output", "TargetReport"), (APART, "node back", "Unmixed")],
    ids=["to the output", "to a node"],
)
@pytest.mark.parametrize("entry", [faulty_nodes.corrupting, faulty_nodes.lying])
def test_a_malformed_message_costs_its_frame_and_is_kept(
    config, tmp_path, entry, more, where, kind, monkeypatch, command
):
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text() + more)
    config = load_config(file)
    monkeypatch.setattr("pipeline.runtime.supervisor.run_node", entry)
    messages, restarts = played(config)
    assert restarts == 0
    (gap,) = gaps(messages)
    assert (gap["frame_seq"], gap["stage"]) == (3, "transport")
    assert "malformed" in gap["reason"]
    letters = DeadLetters.letters(config.dead_letters.folder)
    result = command("pipeline", "replay-dead-letter", *letters)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(letters)
    assert f"frame 3 at {where}" in lines[-1]
    if entry is faulty_nodes.lying:
        assert f"reads as {kind} of frame 4" in lines[-1]
    else:
        assert "still malformed: header" in lines[-1]


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A folder for three letters and 2 MB, that takes as many a second as there are."""
    monkeypatch.setattr("pipeline.runtime.dead_letters.LETTERS_PER_S", 1000)
    folder = tmp_path / "letters"
    return DeadLetters(DeadLetterSettings(folder=folder, keep=3, keep_mb=2), "cafe"), folder


def test_the_folder_of_dead_letters_stays_small(letters):
    letters, folder = letters
    for number in range(10):
        letters.keep([b"x" * 10], f"cause {number}")
    kept = DeadLetters.letters(folder)
    assert [read_letter(path)["cause"] for path in kept] == ["cause 7", "cause 8", "cause 9"]
    assert letters.count == 10
    assert "still malformed" in replay_letter(kept[0])
    for _ in range(3):
        letters.keep([b"x" * (1 << 25)], "enormous", "frame")
    kept = DeadLetters.letters(folder)
    assert sum(path.stat().st_size for path in kept) < 2e6
    assert "(it was cut when it was kept)" in replay_letter(kept[-1])


def test_a_flood_is_counted_and_a_few_of_it_kept(tmp_path):
    letters = DeadLetters(DeadLetterSettings(folder=tmp_path), "cafe")
    for _ in range(1000):
        letters.keep([b"x"], "again", count=2)
    assert letters.count == 2000
    assert LETTERS_PER_S <= len(DeadLetters.letters(tmp_path)) <= 3 * LETTERS_PER_S


def test_what_a_killed_run_left_half_written_goes_at_the_next_start(tmp_path):
    (tmp_path / f"{5:020d}.new").write_bytes(b"half a letter")
    (tmp_path / "notes.new").write_text("somebody's own")
    DeadLetters(DeadLetterSettings(folder=tmp_path), "cafe")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.new"]


@pytest.mark.parametrize("step", ["write_bytes", "rename"])
def test_a_letter_for_which_there_is_no_room_leaves_nothing(letters, monkeypatch, caplog, step):
    letters, folder = letters
    write_bytes = Path.write_bytes

    def full(path, argument):
        write_bytes(path, b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, step, full)
    letters.keep([b"x"], "cause")
    assert "could not be kept (No space left on device)" in caplog.text
    assert list(folder.iterdir()) == []


def test_the_oldest_letter_goes_though_the_clock_went_back(letters, monkeypatch):
    letters, folder = letters
    letters.keep([b"x"], "cause 0")
    monkeypatch.setattr("time.time_ns", lambda: 5)
    for number in range(1, 6):
        letters = DeadLetters(DeadLetterSettings(folder=folder, keep=3), "cafe")
        letters.keep([b"x"], f"cause {number}")
    kept = [read_letter(path) for path in DeadLetters.letters(folder)]
    assert [letter["cause"] for letter in kept] == ["cause 3", "cause 4", "cause 5"]
    assert [letter["t_utc_ns"] for letter in kept] == [5, 5, 5]


FRAME = [
    msgpack.packb(
        {"schema": "irst.frame/1", "seq": 8, "t_exposure_ns": 1, "dtype": "uint8", "shape": [1, 3]}
    ),
    b"abc",
]


@pytest.mark.parametrize(
    ("kind", "parts", "said"),
    [
        ("frame", FRAME, "reads as frame 8, 3×1 uint8"),
        ("frame", [FRAME[0], b"ab"], "still malformed: 3×1 uint8 needs 3 bytes, not 2"),
        ("frame", [], "still malformed: 0 parts; send two"),
        ("word", [Word("result", 4).pack()], "reads as the word `result` of frame 4"),
        ("word", [b"rubbish"], "still malformed: word"),
        ("word", [], "still malformed: word"),
        ("message", [], "still malformed: header"),
        ("message", [b""] * 100, "still malformed: header"),
    ],
)
def test_each_letter_is_read_as_what_it_should_have_been(letters, kind, parts, said, command):
    letters, folder = letters
    letters.keep(parts, "cause", kind)
    result = command("pipeline", "replay-dead-letter", *DeadLetters.letters(folder))
    assert result.stderr == ""
    assert f".letter: cause: {said}" in result.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": [1, None]},
        {"parts": [b"x"] * 65},
        {"parts": "x"},
        {"kind": "novel"},
        {"kind": None},
        {"cause": b"x"},
        {"more": 1},
    ],
)
def test_letters_that_somebody_has_changed_are_refused_in_one_line(tmp_path, changes, command):
    letter = {"cause": "c", "config": "c", "t_utc_ns": 1, "kind": "word", "parts": [b"x"]}
    file = tmp_path / "1.letter"
    file.write_bytes(msgpack.packb(letter | changes))
    assert_one_line_error(command("pipeline", "replay-dead-letter", file), "not a dead letter")


def test_what_is_no_dead_letter_is_named(command, tmp_path):
    file = tmp_path / "1.letter"
    file.write_text(json.dumps({"no": "letter"}))
    assert_one_line_error(command("pipeline", "replay-dead-letter", file), "1.letter")
    file.write_bytes(b"\x91" * 5000)
    for path, said in (
        (file, r"1.letter: not a dead letter \(\w+\); give files of dead_letters.folder"),
        (tmp_path / "nope", "nope: cannot be read .No such file.*; give files of dead_letters"),
        (tmp_path, "cannot be read .Is a directory.; give files of dead_letters.folder"),
    ):
        with pytest.raises(PipelineError, match=said):
            read_letter(path)


def test_nothing_that_a_terminal_obeys_is_printed_of_a_letter(letters, capsys):
    letters, folder = letters
    letters.keep([b"x"], "node\x1b[2J\x07 said\nno ×")
    replay_dead_letter(DeadLetters.letters(folder))
    assert r".letter: node\x1b[2J\x07 said no ×: still malformed" in capsys.readouterr().out
