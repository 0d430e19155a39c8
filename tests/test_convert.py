"""Files of the trade into recordings: exact there and back, and what is wrong with them named."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from astropy.io import fits
from conftest import assert_one_line_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_array_equal

from pipeline.errors import PipelineError
from pipeline.formats.foreign import open_footage
from pipeline.formats.foreign.footage import utc_ns
from pipeline.formats.foreign.ser import TICKS_TO_1970
from pipeline.formats.png import read_header
from pipeline.formats.recording import open_recording
from pipeline.ingest import convert

START_NS = 1_790_000_000_123_456_700  # a whole number of SER's ticks of 100 ns


def stack_of(number=5, shape=(13, 17), dtype=np.uint16, seed=0):
    highest = np.iinfo(dtype).max
    rng = np.random.default_rng(seed)
    return rng.integers(0, highest, (number, *shape), dtype, endpoint=True)


# --- writers -------------------------------------------------------------------------------------


def write_npy(folder, stack):
    np.save(folder / "a.npy", stack)
    return folder / "a.npy"


def write_pngs(folder, stack):
    (folder / "pngs").mkdir()
    for index, pixels in enumerate(stack):
        cv2.imwrite(str(folder / "pngs" / f"frame{index}.png"), pixels)
    return folder / "pngs"


def write_tiffs(folder, stack):
    (folder / "tiffs").mkdir()
    for index, pixels in enumerate(stack):
        cv2.imwrite(str(folder / "tiffs" / f"frame{index}.tif"), pixels)
    return folder / "tiffs"


def write_pages(folder, stack):
    cv2.imwritemulti(str(folder / "a.tiff"), list(stack))
    return folder / "a.tiff"


def write_cube(folder, stack):
    fits.PrimaryHDU(stack).writeto(folder / "a.fits")
    return folder / "a.fits"


def write_ser(folder, stack, depth=None, flag=0, order="<", stamps=True, colour=0, name="a.ser"):
    number, height, width = stack.shape
    depth = depth or 8 * stack.dtype.itemsize
    texts = (b"observer".ljust(40), b"camera".ljust(40), b"telescope".ljust(40))
    numbers = (0, colour, flag, width, height, depth, number)
    head = struct.pack("<14s7i40s40s40s2q", b"LUCAM-RECORDER", *numbers, *texts, 0, 0)
    ticks = TICKS_TO_1970 + START_NS // 100 + np.arange(number) * 100_000
    body = stack.astype(stack.dtype.newbyteorder(order)).tobytes()
    path = folder / name
    path.write_bytes(head + body + (ticks.astype("<i8").tobytes() if stamps else b""))
    return path


ENVI_TYPES = {"uint8": 1, "int16": 2, "int32": 3, "float32": 4, "uint16": 12, "uint32": 13}


def write_envi(folder, stack, interleave="bsq", order="<", offset=0, extra=""):
    number, height, width = stack.shape
    axes = {"bsq": (0, 1, 2), "bil": (1, 0, 2), "bip": (1, 2, 0)}[interleave]
    body = stack.astype(stack.dtype.newbyteorder(order)).transpose(axes).tobytes()
    (folder / "a.img").write_bytes(bytes(offset) + body)
    (folder / "a.hdr").write_text(
        f"ENVI\ndescription = {{\n  frames = of a camera }}\n"
        f"samples = {width}\nlines   = {height}\nbands   = {number}\n"
        f"header offset = {offset}\ndata type = {ENVI_TYPES[stack.dtype.name]}\n"
        f"interleave = {interleave}\nbyte order = {int(order == '>')}\n{extra}"
    )
    return folder / "a.hdr"


WRITERS = {
    "npy": write_npy,
    "png": write_pngs,
    "tiff folder": write_tiffs,
    "tiff pages": write_pages,
    "fits": write_cube,
    "ser": write_ser,
    "envi": write_envi,
}


def converted(path, tmp_path, **options):
    out = tmp_path / "out.zarr"
    convert(path, out, **options)
    return open_recording(out)


def frames_of(recording):
    return np.stack([recording.frame(index) for index in range(len(recording))])


# --- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("form", list(WRITERS))
def test_every_format_comes_through_count_by_count(tmp_path, form, dtype):
    stack = stack_of(12, dtype=dtype)  # frame10 comes after frame9, not after frame1
    recording = converted(WRITERS[form](tmp_path, stack), tmp_path, rate_hz=50.0)
    assert_array_equal(frames_of(recording), stack)
    assert frames_of(recording).dtype == dtype
    assert recording.sensor.full_scale == np.iinfo(dtype).max
    assert_array_equal(np.diff(recording.timestamp_ns), 20_000_000)


@given(data=st.data(), form=st.sampled_from(list(WRITERS)))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_counts_of_any_shape_come_through(tmp_path_factory, data, form):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)))
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16]))
    stack = data.draw(hnp.arrays(dtype, shape))
    folder = tmp_path_factory.mktemp("any")
    footage = open_footage(WRITERS[form](folder, stack))
    assert (footage.length, footage.shape) == (shape[0], shape[1:])
    assert_array_equal([footage.read(index) for index in range(footage.length)], stack)


def test_wider_types_come_through_where_their_counts_fit(tmp_path):
    stack = stack_of(3).astype(np.int32)
    np.save(tmp_path / "a.npy", stack.astype(">i4"))
    recording = converted(tmp_path / "a.npy", tmp_path, rate_hz=10.0)
    assert_array_equal(frames_of(recording), stack)
    assert recording.sensor.full_scale == 65535


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
def test_envi_interleaves_and_byte_orders(tmp_path, interleave, order):
    stack = stack_of(4)
    extra = "acquisition time = 2026-09-21T14:13:20.5Z\n"
    path = write_envi(tmp_path, stack, interleave, order, offset=7, extra=extra)
    recording = converted(path.with_suffix(".img"), tmp_path, rate_hz=10.0)
    assert_array_equal(frames_of(recording), stack)
    assert recording.timestamp_ns[0] == utc_ns("2026-09-21 14:13:20.500")


def test_ser_keeps_its_timestamps_and_says_its_depth(tmp_path):
    stack = stack_of(6) >> 4
    recording = converted(write_ser(tmp_path, stack, depth=12), tmp_path)
    assert_array_equal(frames_of(recording), stack)
    assert recording.sensor.full_scale == 4095
    assert_array_equal(recording.timestamp_ns, START_NS + np.arange(6) * 10_000_000)


@pytest.mark.parametrize(("flag", "order"), [(0, "<"), (1, ">"), (0, ">"), (1, "<")])
def test_ser_byte_order_as_programs_write_it_or_as_the_depth_shows(tmp_path, flag, order):
    stack = stack_of(3) >> 4
    path = write_ser(tmp_path, stack, depth=12, flag=flag, order=order)
    assert_array_equal(frames_of(converted(path, tmp_path)), stack)


def test_fits_images_keep_the_middle_of_their_exposures(tmp_path):
    stack = stack_of(4)
    (tmp_path / "night").mkdir()
    for index, pixels in enumerate(stack):
        unit = fits.PrimaryHDU(pixels)
        unit.header["DATE-OBS"] = f"2026-09-21T14:13:2{index}.123456789"
        unit.header["EXPTIME"] = 0.5
        unit.writeto(tmp_path / "night" / f"{index}.fits")
    recording = converted(tmp_path / "night", tmp_path)
    assert_array_equal(frames_of(recording), stack)
    first_ns = utc_ns("2026-09-21T14:13:20.123456789") + 250_000_000
    assert_array_equal(recording.timestamp_ns, first_ns + np.arange(4) * 1_000_000_000)


def test_iso_times_to_the_nanosecond():
    assert utc_ns("1970-01-01T00:00:01.000000002Z") == 1_000_000_002
    with pytest.raises(ValueError, match="is no ISO date"):
        utc_ns("yesterday")


def test_sensor_from_options_over_the_configuration(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("sensor: {id: mast, sigma_px: 0.8, read_noise: 4, gain: 12}\n")
    path = write_npy(tmp_path, stack_of() >> 2)
    options = {"config": config, "full_scale": 16383, "sigma_px": 0.6}
    recording = converted(path, tmp_path, rate_hz=10.0, start="2026-01-01T00:00:00", **options)
    sensor = recording.sensor
    assert (sensor.id, sensor.sigma_px, sensor.full_scale) == ("mast", 0.6, 16383)
    assert (sensor.read_noise, sensor.gain) == (4.0, 12.0)
    assert recording.timestamp_ns[0] == utc_ns("2026-01-01T00:00:00")
    assert "assumed" not in capsys.readouterr().out


def test_what_is_assumed_is_said(tmp_path, capsys):
    converted(write_npy(tmp_path, stack_of()), tmp_path, rate_hz=10.0)
    assert "assumed: sigma_px, read_noise, gain" in capsys.readouterr().out


# --- what is wrong -------------------------------------------------------------------------------


def refused(path, tmp_path, message, **options):
    """One line, and nothing is left of the recording."""
    options = {"rate_hz": 10.0} | options
    with pytest.raises(PipelineError, match=message) as error:
        convert(path, tmp_path / "out.zarr", **options)
    assert "\n" not in str(error.value)
    assert not [file for file in tmp_path.iterdir() if "out.zarr" in file.name]


@pytest.mark.parametrize("form", ["npy", "tiff pages", "fits", "ser"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 0.99])
def test_a_file_cut_short_is_named(tmp_path, capfd, form, share):
    path = WRITERS[form](tmp_path, stack_of(6, (40, 50)))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, tmp_path, path.name)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("form", ["png", "tiff folder"])
def test_a_damaged_image_in_a_folder_is_named_and_nothing_is_left(tmp_path, capfd, form):
    path = WRITERS[form](tmp_path, stack_of(6, (40, 50)))
    third = sorted(path.iterdir())[3]
    whole = third.read_bytes()
    third.write_bytes(whole[: len(whole) // 2])
    refused(path, tmp_path, rf"{third.name}: (cannot be decoded|its directory ends)")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".npy", ".png", ".tif", ".fits", ".ser", ".hdr"])
@pytest.mark.parametrize("content", [b"", b"this is no picture " * 40])
def test_what_is_none_of_its_kind_is_named(tmp_path, capfd, suffix, content):
    (tmp_path / f"a{suffix}").write_bytes(content)
    (tmp_path / "a.img").write_bytes(b"")
    refused(tmp_path / f"a{suffix}", tmp_path, rf"a{suffix}")
    assert capfd.readouterr().err == ""


def test_envi_data_of_another_length_is_named(tmp_path):
    path = write_envi(tmp_path, stack_of())
    data = path.with_suffix(".img")
    data.write_bytes(data.read_bytes()[:-1])
    refused(
        path, tmp_path, r"a.img: 5 bands of 17×13 uint16 need 2210 bytes, but the file has 2209"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data type = 12", r"a.hdr: `data type` must be one of .*, got 4"),
        ("interleave = bsq", r"a.hdr: `interleave` must be one of bsq, bil, bip, got 4"),
        ("samples = 17", r"a.hdr: `samples` must be a whole number, got '4.5'"),
        ("byte order = 0", r"a.hdr: `byte order` must be one of 0, 1, got 4"),
    ],
)
def test_envi_headers_that_make_no_sense_are_named(tmp_path, line, message):
    path = write_envi(tmp_path, stack_of())
    text = path.read_text()
    assert line in text
    wrong = "4.5" if "samples" in line else "4"
    path.write_text(text.replace(line, f"{line.split(' = ')[0]} = {wrong}"))
    refused(path, tmp_path, message)


def test_envi_needs_both_files(tmp_path):
    path = write_envi(tmp_path, stack_of())
    path.unlink()
    refused(path.with_suffix(".img"), tmp_path, "a.img: no ENVI header beside it; give a.hdr")
    path = write_envi(tmp_path, stack_of())
    path.with_suffix(".img").unlink()
    refused(path, tmp_path, r"a.hdr: no data beside it, e.g. a.img")
    path = write_envi(tmp_path, stack_of(), extra="acquisition time = noon\n")
    refused(path, tmp_path, "acquisition time: 'noon' is no ISO date")


@pytest.mark.parametrize("form", ["png", "tiff folder"])
def test_mixed_sizes_are_named(tmp_path, form):
    path = WRITERS[form](tmp_path, stack_of())
    odd = sorted(path.iterdir())[2]
    cv2.imwrite(str(odd), np.zeros((13, 18), np.uint16))
    refused(path, tmp_path, rf"{odd.name}: is 18×13, but frame0\.\w+ before it 17×13")


def test_pages_of_mixed_sizes_are_named_and_nothing_is_left(tmp_path):
    cv2.imwritemulti(
        str(tmp_path / "a.tif"), [np.zeros((13, 17), np.uint16), np.zeros((13, 18), np.uint16)]
    )
    refused(tmp_path / "a.tif", tmp_path, r"a.tif: page 1: is 18×13, but the first page 17×13")


def test_mixed_kinds_and_empty_folders_are_named(tmp_path):
    folder = write_pngs(tmp_path, stack_of(2))
    cv2.imwrite(str(folder / "x.tif"), np.zeros((13, 17), np.uint16))
    refused(folder, tmp_path, r"pngs: holds files of .png, .tif; give a folder of one kind")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "empty: holds no image files")


def test_wrong_types_are_named(tmp_path):
    np.save(tmp_path / "f.npy", np.zeros((2, 3, 4), np.float32))
    refused(tmp_path / "f.npy", tmp_path, r"f.npy: pixels are float32; they must be whole counts")
    np.save(tmp_path / "c.npy", np.zeros((2, 3, 4, 3), np.uint8))
    refused(tmp_path / "c.npy", tmp_path, r"c.npy: has shape \(2, 3, 4, 3\)")
    np.save(tmp_path / "n.npy", np.array([np.zeros((3, 4)), np.full((3, 4), -1)], np.int16))
    refused(tmp_path / "n.npy", tmp_path, r"n.npy: frame 1: counts run from -1 to -1")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    refused(tmp_path / "o.npy", tmp_path, r"o.npy: not a whole NPY file")
    cv2.imwrite(str(tmp_path / "c.png"), np.zeros((13, 17, 3), np.uint8))
    refused(tmp_path / "c.png", tmp_path, r"c.png: is colour")
    cv2.imwrite(str(tmp_path / "f.tif"), np.zeros((13, 17), np.float32))
    refused(tmp_path / "f.tif", tmp_path, r"f.tif: pixels are float32")
    refused(write_ser(tmp_path, stack_of(), colour=8), tmp_path, "colour id 8; frames must be grey")
    fits.PrimaryHDU(np.zeros((3, 4), np.float32)).writeto(tmp_path / "f.fits")
    refused(tmp_path / "f.fits", tmp_path, r"f.fits: pixels are >?f")
    fits.PrimaryHDU().writeto(tmp_path / "none.fits")
    refused(tmp_path / "none.fits", tmp_path, r"none.fits: holds no image")


def test_a_damaged_ser_header_is_named(tmp_path):
    path = write_ser(tmp_path, stack_of(), depth=24)
    refused(path, tmp_path, r"a.ser: 5 frames of 17×13 with 24 bits; the header is damaged")


def test_a_bad_fits_date_is_named(tmp_path):
    unit = fits.PrimaryHDU(stack_of(1)[0])
    unit.header["DATE-OBS"] = "last night"
    unit.writeto(tmp_path / "a.fits")
    refused(tmp_path / "a.fits", tmp_path, r"a.fits: DATE-OBS or EXPTIME: 'last night'")


def test_counts_beyond_the_given_full_scale_are_named_and_nothing_is_left(tmp_path):
    stack = stack_of() >> 4
    stack[3, 0, 0] = 5000
    path = write_npy(tmp_path, stack)
    message = r"a.npy: frame 3: frame exceeds full scale 4095: 5000"
    refused(path, tmp_path, message, full_scale=4095)


def test_times_that_are_missing_or_stand_still_are_named(tmp_path):
    refused(write_npy(tmp_path, stack_of()), tmp_path, r"a.npy: holds no timestamps", rate_hz=None)
    still = stack_of(3)
    path = write_ser(tmp_path, still)
    ticks = np.full(3, TICKS_TO_1970, "<i8").tobytes()
    path.write_bytes(path.read_bytes()[: -len(ticks)] + ticks)
    message = r"a.ser: frame 1: its timestamp does not follow .*; give --rate-hz instead"
    refused(path, tmp_path, message, rate_hz=None)
    refused(path, tmp_path, "--start goes with --rate-hz", rate_hz=None, start="2026-01-01")
    refused(path, tmp_path, "--start: 'noon' is no ISO date", start="noon")
    refused(path, tmp_path, "--rate-hz must be from 0.001 to 1000000, got 0", rate_hz=0.0)
    refused(path, tmp_path, r"convert: sensor.sigma_px must be from 0.1 to 5 px", sigma_px=9.0)


def test_unknown_and_missing_files_are_named(tmp_path):
    refused(tmp_path / "none.npy", tmp_path, r"none.npy: no such file or folder")
    (tmp_path / "a.doc").write_bytes(b"")
    refused(tmp_path / "a.doc", tmp_path, r"a.doc: not a format known here; convert reads .bil,")


def test_the_command(tmp_path, command):
    path = write_pngs(tmp_path, stack_of(3, (20, 24)))
    out = tmp_path / "out.zarr"
    words = ["pipeline", "convert", path, out, "--rate-hz", "30", "--full-scale", "65535"]
    result = command(*words)
    assert result.returncode == 0, result.stderr
    assert "wrote" in result.stdout and "3 frames of 24×20" in result.stdout
    assert_one_line_error(command(*words), "exists already")
    Path(path / "frame1.png").write_bytes(b"")
    words[3] = tmp_path / "again.zarr"
    assert_one_line_error(command(*words), "frame1.png: cannot be decoded")
    assert not (tmp_path / "again.zarr").exists()


@pytest.mark.parametrize("shape", [(10**30,), (3, 2**61)])
def test_an_impossible_shape_is_named(tmp_path, capfd, shape):
    path = write_npy(tmp_path, stack_of(1))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"(1, 13, 17), }".ljust(40), f"{shape}, }}".encode().ljust(40)))
    assert path.read_bytes() != whole
    refused(path, tmp_path, r"a.npy: not a whole NPY file")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NAXIS2", "-5", "a negative NAXISn"),
        ("EXPTIME", "", "EXPTIME"),
        ("EXPTIME", "1E300", "EXPTIME"),
    ],
)
def test_fits_headers_that_make_no_sense_are_named(tmp_path, key, value, message):
    unit = fits.PrimaryHDU(stack_of(1)[0])
    unit.header["EXPTIME"] = 0.5
    unit.header["DATE-OBS"] = "2026-09-21T14:13:20"
    unit.writeto(tmp_path / "a.fits")
    whole = (tmp_path / "a.fits").read_bytes()
    card = whole.index(key.ljust(8).encode() + b"=")
    changed = f"{key:8}= {value:>20}".ljust(80).encode()
    (tmp_path / "a.fits").write_bytes(whole[:card] + changed + whole[card + 80 :])
    refused(tmp_path / "a.fits", tmp_path, message)


def test_a_png_of_more_pixels_than_its_bytes_can_hold_is_not_decoded():
    def chunk(kind, body):
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 16, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert read_header(b"\x89PNG\r\n\x1a\n" + body) is None
    small = cv2.imencode(".png", np.zeros((300, 400), np.uint16))[1].tobytes()
    assert read_header(small) == (400, 300, 16, 0)
