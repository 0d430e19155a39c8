"""Pixels to angles: directions against the forward model and OpenCV, covariance against draws."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.component import component
from pipeline.config import load_config
from pipeline.errors import PipelineError
from pipeline.messages import FrameInfo, Patches, Pose, Trace, Unmixed
from pipeline.physics.geometry import Geometry
from pipeline.physics.sensor import Sensor
from pipeline.runtime.flow import build_flow
from pipeline.sensing import GeometrySettings, SensorSettings, camera, stage_context
from pipeline.transport import codec
from pipeline.wire import TargetsMessage, check_wire, targets_message

LENS = (-0.21, 0.07, 0.0008, -0.0005, -0.01)
WIDE = Geometry(800.0, 810.0, 322.0, 250.5, LENS, (1.2, 0.3, 0.1))
NONE = np.zeros((1, 3))


def project(geometry, az, el, boresight):
    """The forward model, written from its description: angles to pixels."""
    az0, el0, roll = boresight
    world = np.array([np.sin(az) * np.cos(el), np.cos(az) * np.cos(el), np.sin(el)])
    turn_az = np.array(  # east, north, up → right, forward, up
        [[math.cos(az0), -math.sin(az0), 0], [math.sin(az0), math.cos(az0), 0], [0, 0, 1]]
    )
    turn_el = np.array(
        [[1, 0, 0], [0, math.cos(el0), math.sin(el0)], [0, -math.sin(el0), math.cos(el0)]]
    )
    right, forward, up = turn_el @ turn_az @ world
    level_x, level_y = right / forward, -up / forward
    x = math.cos(roll) * level_x + math.sin(roll) * level_y
    y = -math.sin(roll) * level_x + math.cos(roll) * level_y
    k1, k2, p1, p2, k3 = geometry.distortion
    square = x * x + y * y
    radial = 1 + k1 * square + k2 * square**2 + k3 * square**3
    bent_x = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x)
    bent_y = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y
    return (
        geometry.cx_px + geometry.fx_px * bent_x,
        geometry.cy_px + geometry.fy_px * bent_y,
    )


def test_the_principal_point_looks_along_the_boresight():
    az, el, _ = WIDE.angles([(322.0, 250.5)], NONE)
    assert_allclose((az[0], el[0]), (1.2, 0.3), atol=1e-12)
    az, el, _ = WIDE.angles([(322.0, 250.5)], NONE, (-3.0, -0.2, 2.0))
    assert_allclose((az[0], el[0]), (-3.0, -0.2), atol=1e-12)


def test_right_is_clockwise_and_up_is_up_and_a_roll_turns_the_camera_clockwise():
    level = Geometry(1000.0, 1000.0, 0.0, 0.0)
    az, el, _ = level.angles([(10.0, 0.0), (0.0, -10.0)], np.zeros((2, 3)))
    assert_allclose(az, [math.atan(0.01), 0.0], atol=1e-12)
    assert_allclose(el, [0.0, math.atan(0.01)], atol=1e-12)
    # The right side of a camera turned clockwise points down.
    az, el, _ = level.angles([(10.0, 0.0)], NONE, (0.0, 0.0, math.pi / 2))
    assert_allclose((az[0], el[0]), (0.0, -math.atan(0.01)), atol=1e-12)


@given(
    x=st.floats(0, 639),
    y=st.floats(0, 511),
    boresight=st.tuples(st.floats(-3.1, 3.1), st.floats(-1.0, 1.0), st.floats(-3.0, 3.0)),
)
@settings(max_examples=80, deadline=None)
def test_angles_project_back_to_their_pixel(x, y, boresight):
    az, el, _ = WIDE.angles([(x, y)], NONE, boresight)
    assert_allclose(project(WIDE, az[0], el[0], boresight), (x, y), atol=1e-7)


def test_the_lens_is_opencvs(rng):
    straight = rng.uniform((-0.35, -0.28), (0.35, 0.28), (50, 2))
    rays = np.concatenate([straight, np.ones((50, 1))], axis=1)
    bent, _ = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), np.eye(3), np.array(LENS))
    assert_allclose(WIDE.undistorted(bent[:, 0].astype(np.float64)), straight, atol=1e-10)


@pytest.mark.parametrize("boresight", [(1.2, 0.3, 0.1), (math.pi, -0.4, 1.0)])
def test_the_covariance_is_that_of_drawn_positions(rng, boresight):
    cov = np.array([[0.04, 0.012], [0.012, 0.01]])
    middle = np.array([350.0, 260.0])
    drawn = rng.multivariate_normal(middle, cov, 40000)
    az, el, _ = WIDE.angles(drawn, np.zeros((len(drawn), 3)), boresight)
    _, _, found = WIDE.angles([middle], [(0.04, 0.012, 0.01)], boresight)
    az = (az - boresight[0] + math.pi) % (2 * math.pi)  # away from where azimuth wraps
    wanted = np.cov(az, el)
    scale = math.sqrt(wanted[0, 0] * wanted[1, 1])
    assert_allclose(found[0, 0], wanted[0, 0], rtol=0.04)
    assert_allclose(found[0, 2], wanted[1, 1], rtol=0.04)
    assert_allclose(found[0, 1], wanted[0, 1], atol=0.03 * scale)


def test_no_targets_have_no_angles():
    az, el, cov = WIDE.angles(np.empty((0, 2)), np.empty((0, 3)))
    assert (az.shape, el.shape, cov.shape) == ((0,), (0,), (0, 3))


# --- configuration -------------------------------------------------------------------------------


def test_what_is_not_given_follows_from_the_sensor():
    sensor = Sensor(ifov_rad=1e-3)
    found = camera(GeometrySettings(az_rad=0.5), sensor, (512, 640))
    assert found == Geometry(1000.0, 1000.0, 319.5, 255.5, boresight=(0.5, 0.0, 0.0))
    with pytest.raises(PipelineError, match=r"sensor.geometry: give fx_px, or sensor.ifov_rad"):
        camera(GeometrySettings(), Sensor(), (512, 640))


def test_a_lens_that_folds_the_frame_is_refused():
    settings = GeometrySettings(fx_px=300.0, distortion=(-0.9, 0.0, 0.0, 0.0, 0.0))
    with pytest.raises(
        PipelineError, match=r"sensor.geometry.distortion: the distortion cannot be"
    ):
        camera(settings, Sensor(), (512, 640))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{focal: 3}", "unknown field `focal` at sensor.geometry"),
        ("{el_rad: 3}", "sensor.geometry.el_rad: input should be less than or equal to 1.57"),
        ("{distortion: [1]}", "sensor.geometry.distortion"),
    ],
)
def test_mistakes_in_the_geometry_are_named(tmp_path, text, message):
    config = tmp_path / "config.yaml"
    config.write_text(f"sensor: {{geometry: {text}}}\n")
    with pytest.raises(PipelineError, match=message):
        load_config(config)


# --- in the messages -----------------------------------------------------------------------------


def unmixed(pose=None):
    """Two targets of one group in the middle of the frame."""
    patch = np.full((1, 11, 11), 1000.0, np.float32)
    info = FrameInfo(0, "roof", 0, "utc", (512, 640), pose=pose)
    patches = Patches(
        info=info,
        counts_BHW=patch,
        background_BHW=patch,
        usable_BHW=np.ones_like(patch, np.bool_),
        origin_px=np.array([[300, 200]], np.int32),
        group=np.zeros(1, np.int32),
        bbox_px=np.array([[303, 203, 308, 208]], np.int32),
        snr=np.array([20.0], np.float32),
        flags=np.zeros(1, np.uint16),
    )
    return Unmixed(
        patches=patches,
        patch=np.zeros(2, np.int32),
        xy_px=np.array([[304.2, 205.0], [305.9, 205.4]]),
        intensity=np.array([900.0, 800.0]),
        refined=np.zeros(2, np.bool_),
        p_exist=np.full(2, np.nan),
        p_count=np.full(2, np.nan),
        cov_px2=np.full((2, 3), np.nan),
        intensity_sigma=np.full(2, np.nan),
        joint_px2=np.full((1, 0, 0), np.nan),
        cell_px=1 / 3,
        engine="e",
        source="s",
    )


def published(settings, pose=None):
    sensor = Sensor(id="roof", sigma_px=0.5, read_noise=5.0)
    context = stage_context(settings, sensor, (512, 640), "default")
    stage = component("stage", "report")
    report = stage.build(stage.Config(), context).process(unmixed(pose))
    return targets_message(report, stage_ns={}, age_ns=0, gap=[], config="c")


def test_targets_carry_angles_of_a_sensor_with_geometry():
    geometry = GeometrySettings(fx_px=2000.0, az_rad=0.7, el_rad=0.05)
    message = published(SensorSettings(geometry=geometry))
    assert isinstance(check_wire(message), TargetsMessage)
    columns = message["targets"]
    assert len(columns["az_rad"]) == len(columns["x_px"]) == 2
    own = camera(geometry, Sensor(), (512, 640))
    az, el, cov = own.angles(
        np.stack([columns["x_px"], columns["y_px"]], axis=1), columns["cov_px2"]
    )
    assert_allclose(columns["az_rad"], az)
    assert_allclose(columns["el_rad"], el)
    assert_allclose(columns["cov_rad2"], cov)
    assert_allclose(cov[:, 2], np.array(columns["cov_px2"])[:, 2] / 2000.0**2, rtol=0.01)


def test_the_pose_of_a_frame_goes_before_the_configured_boresight():
    settings = SensorSettings(geometry=GeometrySettings(fx_px=2000.0, az_rad=0.7))
    still, moved = published(settings), published(settings, Pose(1.7, 0.0, 0.0))
    step = np.subtract(moved["targets"]["az_rad"], still["targets"]["az_rad"])
    assert_allclose(step, 1.0, atol=1e-12)


def test_pose_and_angles_travel_between_nodes():
    pose = Pose(0.3, -0.1, 0.02)
    parts = codec.encode(unmixed(pose), Trace(0, {}), 0)
    message, _, _ = codec.decode([bytes(parts[0]), *parts[1:]])
    assert message.info.pose == pose
    stage = component("stage", "report")
    settings = SensorSettings(geometry=GeometrySettings(fx_px=2000.0))
    context = stage_context(settings, Sensor(read_noise=5.0), (512, 640), "default")
    report = stage.build(stage.Config(), context).process(message)
    parts = codec.encode(report, Trace(0, {}), 0)
    again, _, _ = codec.decode([bytes(parts[0]), *parts[1:]])
    for name in ("az_rad", "el_rad", "cov_rad2"):
        assert_array_equal(getattr(again.angles, name), getattr(report.angles, name))


def test_without_geometry_there_are_no_angles():
    message = published(SensorSettings(ifov_rad=1e-3))
    assert not {"az_rad", "el_rad", "cov_rad2"} & set(message["targets"])
    check_wire(message)


def test_columns_of_angles_are_as_long_as_the_others():
    message = published(SensorSettings(geometry=GeometrySettings(fx_px=2000.0)))
    message["targets"]["az_rad"].pop()
    with pytest.raises(ValueError, match="columns differ in length"):
        check_wire(message)


def test_the_configured_geometry_reaches_the_flow(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("sensor: {geometry: {distortion: [-5, 0, 0, 0, 0], fx_px: 300}}\n")
    loaded = load_config(config)
    with pytest.raises(PipelineError, match=r"sensor.geometry.distortion"):
        build_flow(loaded, ["report"], Sensor(), (512, 640))
