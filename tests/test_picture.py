"""Which frame and group a picture shows, and what happens when it cannot be drawn."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.component import Source, Truth
from pipeline.errors import PipelineError
from pipeline.formats.writable import check_writable
from pipeline.messages import Frame, FrameInfo
from pipeline.physics.sensor import Sensor
from pipeline.picture import ENLARGE, PANEL_PX, RED, draw, read_messages

SHAPE = (48, 64)
BOXES = [[10, 10, 14, 14], [40, 30, 43, 33]]


class Still(Source):
    """Four equal frames; knows how many were read."""

    sensor, shape = Sensor(id="still"), SHAPE

    def __init__(self, truth: dict[int, list[tuple[float, float]]] | None = None) -> None:
        self.read = 0
        if truth is not None:
            rows = [(frame, xy) for frame, positions in truth.items() for xy in positions]
            self.truth = Truth(
                frame_index=np.array([frame for frame, _ in rows], dtype=np.int32),
                target_id=np.arange(len(rows), dtype=np.int32),
                xy_px=np.array([xy for _, xy in rows]).reshape(-1, 2),
                intensity=np.ones(len(rows), dtype=np.float32),
            )

    @classmethod
    def build(cls, config, sensor):
        return cls()

    def frames(self):
        rng = np.random.default_rng(0)
        for seq in range(4):
            self.read += 1
            pixels = rng.integers(0, 100, SHAPE, dtype=np.uint16)
            yield Frame(FrameInfo(seq, "still", seq, "utc", SHAPE), pixels)


def message(seq, numbers, flags=((), ())):
    """Two groups with so many targets each, in the middle of their boxes."""
    group = [row for row, number in enumerate(numbers) for _ in range(number)]
    total = len(group)
    return {
        "schema": "irst.targets/1",
        "sensor_id": "still",
        "frame_seq": seq,
        "t_exposure_ns": 0,
        "clock": "utc",
        "frame_shape": list(SHAPE),
        "frame_flags": [],
        "targets": {
            "id": list(range(total)),
            "group": group,
            "x_px": [BOXES[row][0] + 1.5 for row in group],
            "y_px": [BOXES[row][1] + 1.5 for row in group],
            "cov_px2": [[0.01, 0.0, 0.01]] * total,
            "intensity": [9.0] * total,
            "intensity_sigma": [1.0] * total,
            "p_exist": [1.0] * total,
            "snr": [9.0] * total,
            "source": ["net"] * total,
            "label": [""] * total,
            "flags": [[]] * total,
        },
        "groups": {
            "id": [0, 1],
            "bbox": BOXES,
            "count_posterior": [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * 2,
            "joint_cov_px2": [[], []],
            "flags": [list(names) for names in flags],
        },
        "stage_ns": {},
        "age_ns": 1,
        "gap": [],
        "engine": "e",
        "config": "c",
    }


def write(path, *messages):
    file = path / "targets.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in messages))
    return file


def panel(path):
    """The enlarged window, right of the overview."""
    return cv2.imread(str(path))[:, 2 * SHAPE[1] + 8 :][: PANEL_PX * ENLARGE]


def test_the_group_shown_is_the_one_with_most_true_targets_of_which_some_were_found(tmp_path):
    targets = write(
        tmp_path,
        message(0, [5, 0]),  # a false alarm
        message(1, [0, 1]),  # three true ones in group 0, none found
        message(2, [3, 1]),  # two true ones in group 1, one of them in the margin
        message(3, [1, 0]),
    )
    truth = {
        1: [(11, 11), (12, 12), (13, 13), (41, 31)],
        2: [(41, 31), (44.25, 31)],
        3: [(11, 11)],
    }
    source = Still(truth)
    out = tmp_path / "picture.png"
    assert draw(source, targets, out, None) == 2
    assert source.read == 3, "frames after the one wanted need not be read"
    red = (panel(out) == RED).all(axis=2)
    assert red.any(), "the window is round group 1, where the true positions are"
    middle = PANEL_PX * ENLARGE // 2
    assert red[middle - 2 * ENLARGE : middle + 2 * ENLARGE].sum() == red.sum()


def test_without_truth_it_is_the_largest_group_that_was_unmixed(tmp_path):
    targets = write(
        tmp_path,
        message(0, [5, 1], flags=(("extended",), ())),
        message(1, [1, 4], flags=((), ("edge", "clutter"))),
        message(2, [2, 0]),
        message(3, [1, 1]),
    )
    assert draw(Still(), targets, tmp_path / "picture.png", None) == 2
    assert draw(Still({}), targets, tmp_path / "picture.png", 3) == 3


def test_frames_without_groups_are_drawn_too(tmp_path):
    empty = message(1, [0, 0])
    empty["groups"] = {name: [] for name in empty["groups"]}
    out = tmp_path / "picture.png"
    assert draw(Still({1: [(3.0, 3.0)]}), write(tmp_path, empty), out, None) == 1
    assert cv2.imread(str(out)) is not None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("picture.jpg", "ends in .png"),
        ("picture", "ends in .png"),
        ("none/p.png", "no such folder"),
        ("taken.png", r"taken\.png: cannot be written \(Is a directory\)"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, name, fault):
    (tmp_path / "taken.png").mkdir()
    source = Still()
    with pytest.raises(PipelineError, match=fault):
        draw(source, tmp_path / "no-targets.jsonl", tmp_path / name, None)
    assert source.read == 0


def test_that_a_file_can_be_written_is_tried_without_a_trace(tmp_path):
    there = tmp_path / "figures.json"
    check_writable(there)
    assert not there.exists()
    there.write_text("before")
    check_writable(there)
    assert there.read_text() == "before"
    with pytest.raises(PipelineError, match=r"/proc/self/x: cannot be written"):
        check_writable(Path("/proc/self/x"))


@pytest.mark.parametrize("other", [{"sensor_id": "roof"}, {"frame_shape": [48, 65]}])
def test_targets_of_another_recording_are_refused(tmp_path, other):
    targets = write(tmp_path, message(0, [1, 0]) | other)
    with pytest.raises(PipelineError, match=r"targets of (roof, 64|still, 65)×48 px, but the rec"):
        draw(Still(), targets, tmp_path / "p.png", None)


def test_a_log_of_the_whole_stream_is_read(tmp_path):
    start = {"schema": "irst.start/1", "sensor_id": "still", "config": "c"}
    gap = {"schema": "irst.gap/1", "sensor_id": "still", "frame_seq": 1, "stage": "s", "reason": ""}
    assert list(read_messages(write(tmp_path, start, message(0, [1, 0]), gap))) == [0]


@pytest.mark.parametrize(
    ("second", "fault"),
    [
        ("nonsense", "line 2 is not JSON"),
        (3000 * "[", "line 2 is not JSON"),
        ("[]", "line 2 is no message: unknown schema None"),
        ('{"schema": "irst.targets/9"}', "line 2 is no message: unknown schema"),
        (
            json.dumps(message(1, [1, 0]) | {"age_ns": "old"}),
            r"line 2 is no message: .*targets/1\.age_ns",
        ),
        (json.dumps(message(1, [1, 0])).replace('"group": [0]', '"group": [2]'), "of its 2 groups"),
        (json.dumps(message(1, [1, 0])).replace("11.5", "NaN"), "targets.x_px.0"),
    ],
)
def test_a_line_that_is_no_message_is_named(tmp_path, second, fault):
    file = write(tmp_path, message(0, [1, 0]))
    file.write_text(file.read_text() + second + "\n")
    with pytest.raises(PipelineError, match=fault) as error:
        read_messages(file)
    assert "\n" not in str(error.value)


def test_files_without_targets_are_named(tmp_path):
    with pytest.raises(PipelineError, match=r"none\.jsonl: cannot read"):
        read_messages(tmp_path / "none.jsonl")
    with pytest.raises(PipelineError, match="holds no target message"):
        read_messages(write(tmp_path))
