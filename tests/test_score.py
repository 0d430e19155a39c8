"""CSO-mAP: properties it must have, a slow reference, and the figures of perfect networks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.grid import grid_detections, target_map
from pipeline.physics.groups import PROFILES, draw_groups
from pipeline.physics.score import THRESHOLDS_PX, cso_map, match_at_gate

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
NONE = np.empty((0, 3))
ONE = np.array([[1.0, 1.0, 0.5]])


def random_images(rng, images=6, ties=False):
    """Detections scattered near truths and elsewhere, some images without one or the other."""
    detections, truths = [], []
    for _ in range(images):
        truth = rng.uniform(0.0, 3.0, (rng.integers(0, 6), 2))
        near = truth[rng.integers(0, len(truth), rng.integers(0, 7))] if len(truth) else truth
        near = near + rng.normal(0.0, 0.12, near.shape)
        found = np.concatenate([near, rng.uniform(0.0, 3.0, (rng.integers(0, 3), 2))])
        score = rng.uniform(0.0, 1.0, (len(found), 1))
        detections.append(np.hstack([found, np.round(3.0 * score) if ties else score]))
        truths.append(truth)
    return detections, truths


def naive_average_precision(detections, truths, threshold_px):
    """The definition, one detection after another, in plain loops."""
    pooled = [(score, image, x, y) for image, rows in enumerate(detections) for x, y, score in rows]
    pooled.sort(key=lambda entry: -entry[0])
    total = sum(len(truth) for truth in truths)
    taken = set()
    recall, precision = [], []
    hits = 0
    for rank, (score, image, x, y) in enumerate(pooled, start=1):
        distances = [np.hypot(x - tx, y - ty) for tx, ty in truths[image]]
        if distances:
            nearest = int(np.argmin(distances))
            if distances[nearest] <= threshold_px and (image, nearest) not in taken:
                taken.add((image, nearest))
                hits += 1
        last_of_its_score = rank == len(pooled) or pooled[rank][0] != score
        if last_of_its_score:
            recall.append(hits / total)
            precision.append(hits / rank)
    area, before = 0.0, 0.0
    for point, value in enumerate(recall):
        area += (value - before) * max(precision[point:])
        before = value
    return area


seeds = st.integers(0, 2**32 - 1)


@EXAMPLES
@given(seed=seeds, ties=st.booleans())
def test_agrees_with_the_definition(seed, ties):
    detections, truths = random_images(np.random.default_rng(seed), ties=ties)
    if sum(map(len, truths)) == 0:
        return
    found = cso_map(detections, truths)
    for threshold_px in THRESHOLDS_PX:
        wanted = naive_average_precision(detections, truths, threshold_px)
        assert_allclose(found.ap[threshold_px], wanted, atol=1e-12)
    assert_allclose(found.mean, np.mean(list(found.ap.values())))


@EXAMPLES
@given(seed=seeds)
def test_a_perfect_detector_scores_one(seed):
    rng = np.random.default_rng(seed)
    truths = [rng.uniform(0.0, 10.0, (rng.integers(0, 6), 2)) for _ in range(5)]
    truths.append(np.array([[1.0, 2.0]]))
    detections = [np.hstack([t, rng.uniform(size=(len(t), 1))]) for t in truths]
    assert cso_map(detections, truths).mean == pytest.approx(1.0, abs=1e-12)


@EXAMPLES
@given(seed=seeds, ties=st.booleans())
def test_the_order_of_images_is_irrelevant(seed, ties):
    rng = np.random.default_rng(seed)
    detections, truths = random_images(rng, ties=ties)
    order = rng.permutation(len(truths))
    shuffled = cso_map([detections[i] for i in order], [truths[i] for i in order])
    assert shuffled.ap == pytest.approx(cso_map(detections, truths).ap, abs=1e-12)


@EXAMPLES
@given(seed=seeds)
def test_the_order_within_an_image_is_irrelevant_even_among_equal_scores(seed):
    rng = np.random.default_rng(seed)
    detections, truths = random_images(rng, ties=True)
    shuffled = [rng.permutation(d) for d in detections], [rng.permutation(t) for t in truths]
    assert cso_map(*shuffled).ap == pytest.approx(cso_map(detections, truths).ap, abs=1e-12)


@EXAMPLES
@given(seed=seeds, ties=st.booleans(), times=st.integers(2, 4))
def test_every_image_several_times_is_as_every_image_once(seed, ties, times):
    detections, truths = random_images(np.random.default_rng(seed), ties=ties)
    repeated = cso_map(detections * times, truths * times)
    assert repeated.ap == pytest.approx(cso_map(detections, truths).ap, abs=1e-12)


@EXAMPLES
@given(seed=seeds, ties=st.booleans())
def test_scores_matter_by_their_order_only(seed, ties):
    detections, truths = random_images(np.random.default_rng(seed), ties=ties)
    warped = [np.hstack([d[:, :2], np.exp(5.0 * d[:, 2:])]) for d in detections]
    assert cso_map(warped, truths).ap == cso_map(detections, truths).ap


def not_better(after, before):
    return all(after.ap[threshold] <= before.ap[threshold] + 1e-12 for threshold in THRESHOLDS_PX)


@EXAMPLES
@given(seed=seeds, ties=st.booleans(), drop=st.sampled_from([0.0, 0.2, 5.0]))
def test_duplicates_never_help(seed, ties, drop):
    rng = np.random.default_rng(seed)
    detections, truths = random_images(rng, ties=ties)
    image = int(rng.integers(len(detections)))
    if len(detections[image]) == 0:
        return
    copy = detections[image][rng.integers(len(detections[image]))] - [0.0, 0.0, drop]
    doubled = list(detections)
    doubled[image] = np.vstack([detections[image], copy])
    assert not_better(cso_map(doubled, truths), cso_map(detections, truths))


@EXAMPLES
@given(seed=seeds, ties=st.booleans())
def test_moving_a_detection_away_never_helps(seed, ties):
    rng = np.random.default_rng(seed)
    detections, truths = random_images(rng, ties=ties)
    image = int(rng.integers(len(detections)))
    if len(detections[image]) == 0:
        return
    moved = [rows.copy() for rows in detections]
    moved[image][rng.integers(len(moved[image])), :2] += 1000.0
    assert not_better(cso_map(moved, truths), cso_map(detections, truths))


@EXAMPLES
@given(seed=seeds, ties=st.booleans(), further=st.floats(1.0, 5.0))
def test_a_single_target_is_never_served_by_a_detection_farther_away(seed, ties, further):
    rng = np.random.default_rng(seed)
    truths = [rng.uniform(0.0, 3.0, (1, 2)) for _ in range(5)]
    detections = []
    for truth in truths:
        near = truth + rng.normal(0.0, 0.12, (rng.integers(1, 4), 2))
        score = rng.uniform(0.0, 1.0, (len(near), 1))
        detections.append(np.hstack([near, np.round(3.0 * score) if ties else score]))
    moved = [rows.copy() for rows in detections]
    one = moved[0][rng.integers(len(moved[0]))]
    one[:2] = truths[0][0] + further * (one[:2] - truths[0][0])
    assert not_better(cso_map(moved, truths), cso_map(detections, truths))


@EXAMPLES
@given(seed=seeds, ties=st.booleans())
def test_an_image_with_neither_detections_nor_truth_changes_nothing(seed, ties):
    rng = np.random.default_rng(seed)
    detections, truths = random_images(rng, ties=ties)
    before = cso_map(detections, truths)
    place = rng.integers(len(truths) + 1)
    detections.insert(place, NONE)
    truths.insert(place, NONE[:, :2])
    assert cso_map(detections, truths) == before


@EXAMPLES
@given(seed=seeds, ties=st.booleans(), score=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 9.0]))
def test_a_false_alarm_in_an_image_without_truth_never_helps(seed, ties, score):
    detections, truths = random_images(np.random.default_rng(seed), ties=ties)
    truths.append(NONE[:, :2])
    alarm = np.array([[1.0, 1.0, score]])
    before, after = (cso_map([*detections, rows], truths) for rows in (NONE, alarm))
    assert not_better(after, before)
    if score < 0.0 and sum(map(len, truths)):  # below every other: the curve has ended
        assert after.ap == pytest.approx(before.ap, abs=1e-12)


@EXAMPLES
@given(seed=seeds)
def test_wider_thresholds_find_as_much_or_more(seed):
    """For one truth an image; among several a wider gate can let a worse detection in first."""
    rng = np.random.default_rng(seed)
    truths = [rng.uniform(0.0, 3.0, (1, 2)) for _ in range(8)]
    detections = [
        np.hstack([t + rng.normal(0.0, 0.15, (1, 2)), rng.uniform(size=(1, 1))]) for t in truths
    ]
    found = list(cso_map(detections, truths).ap.values())
    assert (np.diff(found) >= -1e-12).all()


def test_a_detection_may_match_only_its_nearest_truth():
    truths = [np.array([[1.0, 1.0], [1.3, 1.0]])]
    detections = [np.array([[1.0, 1.0, 0.9], [1.1, 1.0, 0.8]])]
    # The second is within 0.25 px of the free truth, but nearest to the taken one.
    assert cso_map(detections, truths, [0.25]).ap[0.25] == pytest.approx(0.5)


def test_a_worked_example():
    truths = [np.array([[1.0, 1.0]]), np.array([[4.0, 4.0], [8.0, 8.0]])]
    detections = [
        np.array([[5.0, 5.0, 0.9], [1.0, 1.0, 0.8]]),  # false, true
        np.array([[4.0, 4.1, 0.7], [4.0, 4.0, 0.6]]),  # true, taken already
    ]
    # Precision at the hits: 1/2 and 2/3, made monotone: 2/3 twice, each over a third of recall.
    assert cso_map(detections, truths, [0.2]).mean == pytest.approx(4.0 / 9.0)
    # At 0.05 px the third is false and the fourth true: 1/2 at both.
    assert cso_map(detections, truths, [0.05]).mean == pytest.approx(1.0 / 3.0)


def test_further_columns_of_the_truth_are_ignored():
    truths = [np.array([[1.0, 1.0, 230.0, 9.0]])]
    assert cso_map([np.array([[1.0, 1.0, 5.0]])], truths).mean == 1.0


def test_equal_scores_enter_together():
    truths = [np.array([[1.0, 1.0]])]
    right, wrong = [1.0, 1.0, 0.5], [3.0, 3.0, 0.5]
    for rows in ([right, wrong], [wrong, right]):
        assert cso_map([np.array(rows)], truths).mean == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("detections", "truths", "wanted"),
    [
        ([], [], 1.0),
        ([NONE], [NONE[:, :2]], 1.0),
        ([ONE], [NONE[:, :2]], 0.0),
        ([NONE], [ONE], 0.0),
        ([ONE, NONE], [ONE, ONE], 0.5),
        ([ONE, ONE], [ONE, NONE[:, :2]], 0.5),
    ],
)
def test_images_without_detections_or_truth(detections, truths, wanted):
    assert cso_map(detections, truths).mean == pytest.approx(wanted)


def test_senseless_input_is_refused():
    with pytest.raises(ValueError, match="1 images of detections but 2 of truths"):
        cso_map([ONE], [ONE, ONE])
    with pytest.raises(ValueError, match="not finite"):
        cso_map([np.array([[np.nan, 1.0, 0.5]])], [ONE])
    with pytest.raises(ValueError, match="truths hold NaN"):
        cso_map([ONE], [np.array([[1.0, 1.0], [np.nan, np.nan]])])


@pytest.mark.parametrize(("c", "low", "high"), [(3, 0.45, 0.48), (5, 0.72, 0.73), (7, 0.82, 0.84)])
def test_ceiling_of_perfect_detection_on_the_grid(c, low, high):
    groups = draw_groups(PROFILES["csist-100k"], 4000, NumpyRandom(21))
    peaks = grid_detections(target_map(groups.xy_px, groups.intensity, 11, c), c, 50.0)
    rows = np.column_stack([peaks.xy_px, peaks.value])
    detections = np.split(rows, np.searchsorted(peaks.image, np.arange(1, 4000)))
    truths = [xy[:count] for xy, count in zip(groups.xy_px, groups.count, strict=True)]
    assert low <= cso_map(detections, truths).mean <= high


# --- matching at a gate --------------------------------------------------------------------------


def test_gate_matches_the_most_pairs_at_the_least_distance():
    true_xy = np.array([[0.0, 0.0], [1.0, 0.0]])
    found_xy = np.array([[0.9, 0.0], [1.9, 0.0]])
    # Nearest first would pair found 0 with true 1 at 0.1 and leave the others 1.9 apart.
    assert match_at_gate(found_xy, true_xy, 1.0).tolist() == [[0, 0], [1, 1]]
    assert match_at_gate(found_xy, true_xy, 0.5).tolist() == [[0, 1]]


@EXAMPLES
@given(seed=seeds, gate_px=st.floats(0.05, 2.0))
def test_gate_pairs_are_one_to_one_and_within_it(seed, gate_px):
    rng = np.random.default_rng(seed)
    found_xy = rng.uniform(0.0, 4.0, (rng.integers(0, 8), 2))
    true_xy = rng.uniform(0.0, 4.0, (rng.integers(0, 8), 2))
    pairs = match_at_gate(found_xy, true_xy, gate_px)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    distance = np.hypot(*(found_xy[pairs[:, 0]] - true_xy[pairs[:, 1]]).T)
    assert (distance <= gate_px).all()
    free_found = np.delete(found_xy, pairs[:, 0], axis=0)
    free_true = np.delete(true_xy, pairs[:, 1], axis=0)
    left = np.hypot(*np.moveaxis(free_found[:, None] - free_true[None], -1, 0))
    assert (left > gate_px).all()  # nothing that could be paired is left over
