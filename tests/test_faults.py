"""What each fault of a node costs: real processes, replayed over real sockets."""

import json

import faulty_nodes
import pytest
from conftest import assert_one_line_error

from pipeline.config import load_config, open_source
from pipeline.runtime import replay
from pipeline.runtime.dead_letters import DeadLetters, replay_letter
from pipeline.runtime.settings import DeadLetterSettings
from pipeline.runtime.supervisor import Supervisor


@pytest.fixture
def config(scene_recording, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"source: {{kind: zarr_recording, path: {scene_recording}}}\n"
        "supervisor: {stall_s: 1}\n"
        f"dead_letters: {{folder: {tmp_path / 'letters'}}}\n"
    )
    return load_config(file)


def played(config):
    """Messages of a replay by nodes with a fault; every number must come once, in order."""
    source = open_source(config)
    with Supervisor(config, "replay", source.sensor, source.shape) as supervisor:
        messages = [message for message, _ in supervisor.messages()]
        restarts = supervisor._children.restarts
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


@pytest.mark.parametrize("entry", [faulty_nodes.dying_once, faulty_nodes.hanging_once])
def test_a_node_that_dies_or_hangs_costs_no_frame(config, entry, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.supervisor.run_node", entry)
    messages, restarts = played(config)
    assert restarts == 1
    assert gaps(messages) == []
    source = open_source(config)
    expected = [message for message, _ in replay.in_process(config, source)]
    assert targets(messages) == targets(expected)


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


def test_the_folder_of_dead_letters_stays_small(tmp_path):
    letters = DeadLetters(DeadLetterSettings(folder=tmp_path / "letters", keep=3), "cafe")
    for number in range(10):
        letters.keep([b"x" * 10], f"cause {number}")
    kept = DeadLetters.letters(tmp_path / "letters")
    assert len(kept) == 3
    assert letters.count == 10
    assert "still malformed" in replay_letter(kept[0])
    letters.keep([b"x" * (1 << 25)], "enormous")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.letter")) < 1000


def test_what_is_no_dead_letter_is_named(command, tmp_path):
    file = tmp_path / "1.letter"
    file.write_text(json.dumps({"no": "letter"}))
    assert_one_line_error(command("pipeline", "replay-dead-letter", file), "1.letter")
