"""The end of a run: do the totals agree, and what does a lost frame cost?"""

import numpy as np
import pytest

from pipeline.formats.recording import Truth
from pipeline.summary import Summary, score

TRUE_XY_PX = np.array([[10.0, 20.0], [30.5, 8.25], [40.0, 40.0]])


def found(seq, xy_px):
    """A target message, as far as a summary reads it."""
    columns = {"x_px": [x for x, _ in xy_px], "y_px": [y for _, y in xy_px]}
    return {
        "schema": "irst.targets/1",
        "frame_seq": seq,
        "targets": columns
        | {"cov_px2": [[0.01, 0.0, 0.01]] * len(xy_px), "p_exist": [0.9] * len(xy_px)},
        "groups": {"id": [0]},
        "stage_ns": {"detect": 5},
        "age_ns": 9,
    }


def gap(seq):
    return {"schema": "irst.gap/1", "frame_seq": seq, "stage": "unmix", "reason": "why"}


def end(frames_in, published, lost=0):
    dropped = [{"stage": "unmix", "reason": "why", "frames": lost}] if lost else []
    totals = {"frames_in": frames_in, "published": published, "dropped": dropped}
    return {"schema": "irst.eos/1", **totals}


def summary_of(*messages):
    summary = Summary()
    for message in messages:
        summary.add(message)
    return summary


def truth_of(*frames):
    """One target a frame: frame k has TRUE_XY_PX[k]."""
    return Truth(
        frame_index=np.array(frames, dtype=np.int32),
        target_id=np.zeros(len(frames), dtype=np.int32),
        xy_px=TRUE_XY_PX[list(frames)],
        intensity=np.full(len(frames), 100.0, dtype=np.float32),
    )


@pytest.mark.parametrize(
    ("messages", "balanced"),
    [
        ([found(0, []), gap(1), found(2, []), end(3, 2, 1)], True),
        ([found(0, []), gap(1), end(3, 2, 1)], False),  # a target message is missing
        ([found(0, []), found(2, []), end(3, 2, 1)], False),  # a gap is missing
        ([found(0, []), gap(1), found(2, []), end(4, 2, 1)], False),  # totals disagree
        ([found(0, []), found(0, []), end(2, 2)], False),  # one frame twice, another never
        ([found(0, []), gap(1), found(2, [])], False),  # no end
        ([], False),
        ([end(0, 0)], True),
    ],
)
def test_a_run_is_balanced_if_its_totals_agree_with_each_other_and_with_what_came(
    messages, balanced
):
    assert summary_of(*messages).balanced is balanced


def test_a_run_that_loses_every_frame_scores_nothing():
    result = score(summary_of(gap(0), gap(1), gap(2), end(3, 0, 3)), truth_of(0, 1, 2))
    assert result.cso_map == 0.0
    assert result.pd == 0.0
    assert result.rmse_px is None
    assert result.false_alarms_per_frame == 0.0


def test_the_targets_of_a_lost_frame_were_missed():
    messages = [found(0, TRUE_XY_PX[:1].tolist()), gap(1), found(2, TRUE_XY_PX[2:].tolist())]
    result = score(summary_of(*messages, end(3, 2, 1)), truth_of(0, 1, 2))
    assert result.pd == pytest.approx(2 / 3)
    assert result.cso_map == pytest.approx(2 / 3)
    assert result.rmse_px == 0.0


def test_lost_frames_do_not_thin_out_false_alarms():
    messages = [found(0, [(10.0, 20.0), (90.0, 90.0)]), gap(1), end(2, 1, 1)]
    result = score(summary_of(*messages), truth_of(0, 1))
    assert result.false_alarms_per_frame == 1.0
