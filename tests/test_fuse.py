"""Fusing targets with the boxes of a detector, on messages made by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from scipy.special import expit, logit

from pipeline.imaging.judgement import independent_count
from pipeline.messages import Dropped, Flag, FrameInfo, Objects, Seen, TargetReport
from pipeline.physics.sensor import Sensor
from pipeline.stages.fuse import Fuse, fused_odds
from pipeline.wire import check_wire, targets_message

INFO = FrameInfo(7, "s", 123, "utc", (100, 120))
PRIOR = logit(0.3)


def report(*groups, sigma_px=0.1):
    """Each group: its targets as x, y, p_exist; or a box x0, y0, x1, y1 for one without targets."""
    rows = [(n, *row) for n, rows in enumerate(groups) if isinstance(rows, list) for row in rows]
    group, x, y, p = (np.array(column) for column in zip(*rows, strict=True)) if rows else ([],) * 4
    group = np.array(group, np.int32)
    boxes = [
        (int(np.min(g, axis=0)[0]) - 3, int(np.min(g, axis=0)[1]) - 3,
         int(np.max(g, axis=0)[0]) + 4, int(np.max(g, axis=0)[1]) + 4)
        if isinstance(g, list) else g
        for g in groups
    ]  # fmt: skip
    number, flags = len(group), np.zeros(len(groups), np.uint16)
    return TargetReport(
        info=INFO,
        engine="e",
        source="net",
        refined=np.zeros(number, np.bool_),
        group=group,
        xy_px=np.stack([x, y], axis=1).reshape(-1, 2).astype(np.float64),
        cov_px2=np.tile([sigma_px**2, 0.0, sigma_px**2], (number, 1)),
        intensity=np.full(number, 500.0),
        intensity_sigma=np.full(number, 50.0),
        p_exist=np.array(p, np.float64),
        snr=np.full(number, 10.0),
        flags=flags[group],
        bbox_px=np.array(boxes, np.int32).reshape(-1, 4),
        count_posterior=independent_count(group, np.array(p, np.float64), len(groups)),
        joint_px2=np.full((len(groups), 0, 0), np.nan),
        group_flags=flags,
    )


def objects(*rows, prior=PRIOR, missed=0.2):
    """Each row: the label, x0, y0, x1, y1, and the calibrated probability of a point source."""
    labels = ("point", "group", "extended", "clutter")
    label = np.array([labels.index(row[0]) for row in rows], np.int32)
    return Objects(
        info=INFO,
        box_px=np.array([row[1:5] for row in rows], np.float64).reshape(-1, 4),
        label=label,
        score=np.full(len(rows), 0.8),
        point_source=label <= 1,
        odds=logit(np.array([row[5] for row in rows], np.float64)),
        labels=labels,
        prior_odds=prior,
        missed_odds=np.log(missed),
        margin_px=4.0,
        centre_sigma_px=0.3,
        engine="d",
    )


def around(x, y, half=4.0):
    return x - half, y - half, x + half, y + half


def fuse(one, two, **config):
    return Fuse(Fuse.Config(**config), Sensor()).process(Seen(one, two))


def test_both_saw_it_and_log_odds_add_up_with_the_prior_taken_off_once():
    found = fuse(report([(50.0, 40.0, 0.6)]), objects(("point", *around(50.1, 40.2), 0.8)))
    wanted = expit(logit(0.6) + logit(0.8) - PRIOR)
    np.testing.assert_allclose(found.p_exist, [wanted])
    np.testing.assert_allclose(found.count_posterior[0, :2], [1 - wanted, wanted])
    assert found.fusion.label == ("point",)
    np.testing.assert_allclose(found.fusion.box_px, [around(50.1, 40.2)])
    np.testing.assert_allclose(found.fusion.p_box, [0.8])
    assert found.flags.tolist() == [0]


def test_a_box_that_says_no_more_than_its_prior_changes_nothing():
    before = report([(50.0, 40.0, 0.6), (50.6, 40.4, 0.55)])
    found = fuse(before, objects(("group", *around(50.3, 40.2), 0.3)))
    np.testing.assert_allclose(found.p_exist, before.p_exist)
    np.testing.assert_allclose(found.count_posterior, before.count_posterior, atol=1e-12)


def test_unmixing_is_believed_only_so_far():
    found = fuse(
        report([(50.0, 40.0, 1.0)]), objects(("clutter", *around(50, 40), 0.02)), surest=0.9
    )
    np.testing.assert_allclose(found.p_exist, [expit(logit(0.9) + logit(0.02) - PRIOR)])


def test_targets_of_a_group_keep_what_they_are_given_that_it_exists():
    before = report([(50.0, 40.0, 0.8), (50.6, 40.4, 0.4)])
    found = fuse(before, objects(("group", *around(50.3, 40.2), 0.9)))
    exists = 1 - 0.2 * 0.6
    after = expit(logit(exists) + logit(0.9) - PRIOR)
    np.testing.assert_allclose(found.p_exist, np.array([0.8, 0.4]) * after / exists)
    np.testing.assert_allclose(1.0 - found.count_posterior[0, 0], after)
    np.testing.assert_allclose(found.count_posterior.sum(axis=1), 1.0)


def test_what_only_unmixing_saw_stays_and_is_marked():
    found = fuse(report([(50.0, 40.0, 0.7)]), objects(("point", *around(90, 80), 0.4), missed=0.2))
    np.testing.assert_allclose(found.p_exist, [expit(logit(0.7) + np.log(0.2))])
    assert Flag(int(found.flags[0])).names == ["unconfirmed"]
    assert Flag(int(found.group_flags[0])).names == ["unconfirmed"]
    assert found.fusion.label == ("",)
    assert np.isnan(found.fusion.box_px).all()


def test_what_only_the_detector_saw_becomes_a_group_without_targets():
    boxes = objects(
        ("point", *around(90, 80), 0.7),
        ("point", *around(20, 20), 0.3),
        ("extended", *around(30, 70, 12), 0.01),
        ("clutter", *around(70, 20), 0.01),
    )
    found = fuse(report([(50.0, 40.0, 0.7)]), boxes)
    assert found.fusion.label == ("", "point", "extended")
    assert found.bbox_px[1:].tolist() == [[86, 76, 94, 84], [18, 58, 42, 82]]
    assert [Flag(int(flags)).names for flags in found.group_flags[1:]] == [["detector_only"]] * 2
    np.testing.assert_allclose(found.count_posterior[1:, :2], [[0.3, 0.7], [1.0, 0.0]])
    assert len(found.p_exist) == 1
    assert fuse(report(), boxes, min_p=0.2, ignore=()).fusion.label == (
        "point", "point", "extended", "clutter",
    )  # fmt: skip


def test_a_box_at_the_edge_stays_in_the_frame():
    found = fuse(report(), objects(("point", 111.5, 91.5, 119.5, 99.5, 0.9)))
    assert found.bbox_px.tolist() == [[112, 92, 120, 100]]


def test_an_extended_object_lowers_all_groups_it_holds_and_is_a_conflict():
    groups = [(40.0, 40.0, 0.8)], [(55.0, 44.0, 0.95)], [(90.0, 80.0, 0.8)]
    found = fuse(report(*groups), objects(("extended", 30, 30, 70, 56, 0.05)))
    assert (found.p_exist[:2] < [0.4, 0.6]).all()
    names = [Flag(int(flags)).names for flags in found.flags]
    assert names == [["conflict"], ["conflict"], ["unconfirmed"]]
    assert found.fusion.label == ("extended", "extended", "")


def test_a_conflict_never_raises_confidence():
    before = report([(50.0, 40.0, 0.6)])
    found = fuse(before, objects(("extended", *around(50, 40, 12), 0.9)))
    np.testing.assert_allclose(found.p_exist, before.p_exist)
    assert Flag(int(found.flags[0])).names == ["conflict"]


def test_a_point_has_one_box_and_a_box_of_a_point_one_group_the_nearest():
    groups = [(50.0, 40.0, 0.7)], [(51.5, 40.0, 0.7)]
    found = fuse(report(*groups, sigma_px=0.4), objects(("point", *around(51.4, 40.0), 0.8)))
    assert found.fusion.label == ("", "point")
    boxes = ("point", *around(50.3, 40), 0.7), ("point", *around(50.1, 40), 0.8)
    found = fuse(report([(50.0, 40.0, 0.7)]), objects(*boxes))
    np.testing.assert_allclose(found.fusion.p_box[0], 0.8)
    assert found.fusion.label == ("point", "point"), "the other box is told of by itself"


@pytest.mark.parametrize(("sigma_px", "label"), [(0.1, ""), (1.0, "point")])
def test_the_gate_follows_the_covariance(sigma_px, label):
    found = fuse(
        report([(50.0, 40.0, 0.7)], sigma_px=sigma_px), objects(("point", *around(52, 41), 0.4))
    )
    assert found.fusion.label == (label,)


def test_a_larger_box_is_as_uncertain_as_it_is_wide():
    target = report([(56.0, 40.0, 0.7)])
    assert fuse(target, objects(("group", *around(50, 40, 4), 0.4))).fusion.label == ("",)
    assert fuse(target, objects(("group", *around(50, 40, 12), 0.4))).fusion.label == ("group",)


def test_a_group_without_targets_is_compared_box_by_box():
    found = fuse(report((20, 20, 44, 36)), objects(("extended", 18, 19, 45, 37, 0.01)))
    assert found.fusion.label == ("extended",)
    assert found.group_flags.tolist() == [0]
    assert len(found.p_exist) == 0
    np.testing.assert_allclose(found.count_posterior, [[1, 0, 0, 0, 0, 0]])


def test_without_an_answer_targets_are_as_they_were_and_the_message_says_why():
    before = report([(50.0, 40.0, 0.7)])
    found = fuse(before, Dropped(7, "yolo", "older than 100 ms"))
    assert replace(found, fusion=None) is not before
    np.testing.assert_array_equal(found.p_exist, before.p_exist)
    np.testing.assert_array_equal(found.flags, before.flags)
    message = wire(found)
    assert message["fusion"] == {"detector": "", "missing": "older than 100 ms"}
    assert message["groups"]["box"] == [[]]


def wire(found):
    message = targets_message(found, stage_ns={}, age_ns=0, gap=[], config="c")
    check_wire(message)
    return message


def test_the_message_carries_label_box_and_probability():
    boxes = objects(("point", *around(50, 40), 0.8), ("extended", *around(90, 80, 9), 0.01))
    message = wire(fuse(report([(50.0, 40.0, 0.6)], [(20.0, 20.0, 0.9)]), boxes))
    assert message["fusion"] == {"detector": "d", "missing": ""}
    assert message["targets"]["label"] == ["point", ""]
    groups = message["groups"]
    assert groups["label"] == ["point", "", "extended"]
    assert groups["box"] == [[46, 36, 54, 44], [], [81, 71, 99, 89]]
    assert groups["p_box"][0] == pytest.approx(0.8)
    assert groups["p_box"][1] is None
    assert groups["flags"] == [[], ["unconfirmed"], ["detector_only"]]


def test_without_fusion_the_message_has_none_of_it():
    message = wire(report([(50.0, 40.0, 0.6)]))
    assert "fusion" not in message
    assert not {"label", "box", "p_box"} & message["groups"].keys()
    assert message["targets"]["label"] == [""]


odds = st.floats(-20.0, 20.0)


@given(own=odds, box=odds, prior=odds)
def test_fused_odds_are_those_of_bayes(own, box, prior):
    """Of two conditionally independent observations after one prior, by their likelihoods."""
    first, second = own - prior, box - prior  # logarithms of the likelihood ratios
    np.testing.assert_allclose(fused_odds(own, box, prior), prior + first + second, atol=1e-9)


@given(
    p=st.floats(0.0, 1.0),
    box=st.floats(1e-6, 1 - 1e-6),
    prior=st.floats(0.01, 0.99),
    missed=st.floats(0.01, 1.0),
    label=st.sampled_from(["point", "extended", None]),
)
def test_whatever_is_fused_is_a_probability_and_ordered(p, box, prior, missed, label):
    at = (50, 40) if label else (100, 90)
    boxes = objects((label or "point", *around(*at), box), prior=logit(prior), missed=missed)
    found = fuse(report([(50.0, 40.0, p)], [(20.0, 20.0, min(1.0, p + 0.05))]), boxes)
    assert np.isfinite(found.p_exist).all()
    assert ((found.p_exist >= 0.0) & (found.p_exist <= 1.0)).all()
    np.testing.assert_allclose(found.count_posterior.sum(axis=1), 1.0)
    check_wire(targets_message(found, stage_ns={}, age_ns=0, gap=[], config="c"))
    if label == "extended":
        assert found.p_exist[0] <= p + 1e-9
    if label == "point" and box > prior and p < 0.9:
        assert found.p_exist[0] >= p - 1e-9
