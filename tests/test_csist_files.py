"""The original CSIST-100K files to and from a dataset: exact both ways, one line for each fault."""

import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.formats.csist import CsistDataset, read_csist, save_csist, write_csist
from pipeline.physics.groups import PROFILES
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor
from trainer import cli, csist_annotation, csist_files
from trainer.errors import TrainerError

HAND_WRITTEN = """\
<?xml version="1.0" ?>
<annotation>
    <filename>CSO7</filename>
    <size>
        <width>11</width>
        <height>11</height>
        <depth>1</depth>
    </size>
    <sigma>0.5</sigma>
    <object>
        <name>Target</name>
        <coordinate>
            <xc>2.25</xc>
            <yc>8.0</yc>
            <brightness>240</brightness>
        </coordinate>
    </object>
</annotation>
"""
PLAIN = np.arange(121, dtype=np.uint8).reshape(11, 11)


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def trainer(monkeypatch, capfd) -> Callable[..., Result]:
    # capfd: what OpenCV would say on its own counts too

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["trainer", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Result(end.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with two images of the split test, both annotated with HAND_WRITTEN."""
    folder = tmp_path / "original"
    for number in (7, 8):
        write_pair(folder / "test", number)
    return folder


def write_pair(split: Path, number: int | str, image=PLAIN, text: str = HAND_WRITTEN) -> None:
    for name in ("cso_img", "Annotations"):
        (split / name).mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(split / f"cso_img/image_{number}.png"), image)
    (split / f"Annotations/CSO{number}.xml").write_text(text)


def read(folder: Path, split: str | None = "test", **told: object) -> CsistDataset:
    unwritten = csist_files.Unwritten(**told)  # type: ignore[arg-type]
    pairs = csist_files.find_pairs(csist_files.split_folder(folder, split))
    return csist_files.read_pairs(pairs, unwritten, ignore)


def ignore(done: int) -> None:
    pass


def assert_same(first: CsistDataset, second: CsistDataset) -> None:
    for name in ("image", "target_count", "target_xy_px", "target_intensity"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes(), name
    assert replace(first.sensor, id="") == replace(second.sensor, id="")
    assert (first.profile, first.background) == (second.profile, second.background)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(result: Result, *fragments: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    for fragment in ("trainer: ", *fragments):
        assert fragment in result.stderr


# --- what the files mean ---------------------------------------------------------------------


def test_xc_is_the_row_and_yc_the_column(tmp_path: Path) -> None:
    image = np.zeros((11, 11), np.uint8)
    image[2, 8], image[3, 8], image[1, 8] = 160, 40, 3  # row 2 and a quarter, column 8
    write_pair(tmp_path / "test", 7, image)
    data = read(tmp_path)
    assert np.unravel_index(data.image[0].argmax(), (11, 11)) == (2, 8)
    np.testing.assert_array_equal(data.target_xy_px[0, 0], [8.0, 2.25])
    mean = render(data.target_xy_px[0, :1], data.target_intensity[0, :1], (11, 11), 0.5)
    assert np.unravel_index(mean.argmax(), (11, 11)) == (2, 8)
    assert mean[3, 8] > 3 * mean[1, 8]


def test_exported_row_is_xc(tmp_path: Path) -> None:
    write_pair(tmp_path / "test", 7)
    csist_files.write_files(tmp_path, "val", read(tmp_path), ignore)
    text = (tmp_path / "val/Annotations/CSO0.xml").read_text()
    assert "<xc>2.25</xc>" in text and "<yc>8.0</yc>" in text
    assert "<brightness>240.0</brightness>" in text


def test_imported_dataset_says_that_it_was_not_drawn(files: Path) -> None:
    data = read(files)
    assert (data.profile, data.seed, data.background) == ("imported", None, 0.0)
    assert data.sensor.noiseless and data.sensor.sigma_px == 0.5
    np.testing.assert_array_equal(data.target_count, [1, 1])
    assert np.isnan(data.target_xy_px[:, 1:]).all() and np.isnan(data.target_intensity[:, 1:]).all()


def test_full_scale_follows_from_the_bits_unless_told(tmp_path: Path) -> None:
    write_pair(tmp_path / "test", 1)
    write_pair(tmp_path / "val", 1, PLAIN.astype(np.uint16) * 100)
    eight, sixteen = read(tmp_path), read(tmp_path, "val")
    assert (eight.image.dtype, eight.sensor.full_scale) == (np.uint8, 255)
    assert (sixteen.image.dtype, sixteen.sensor.full_scale) == (np.uint16, 65535)
    assert read(tmp_path, "val", full_scale=16383).sensor.full_scale == 16383
    with pytest.raises(TrainerError, match=r"12000, full_scale is 4095; .*--full-sc"):
        read(tmp_path, "val", full_scale=4095)


def test_ids_are_sorted_as_numbers_and_may_have_gaps(tmp_path: Path) -> None:
    for number in ("100", "00010", "2"):
        write_pair(tmp_path / "test", number, np.full((11, 11), int(number), np.uint8))
    np.testing.assert_array_equal(read(tmp_path).image[:, 0, 0], [2, 10, 100])


def test_annotation_names_of_the_readme_are_taken_too(tmp_path: Path) -> None:
    write_pair(tmp_path / "test", "00003")
    folder = tmp_path / "test/Annotations"
    (folder / "CSO00003.xml").rename(folder / "CSO_00003.xml")
    assert len(read(tmp_path)) == 1


def test_annotations_may_lie_beside_the_splits(tmp_path: Path) -> None:
    for split, numbers in {"train": (0, 1), "test": (2,)}.items():
        for number in numbers:
            write_pair(tmp_path / split, number)
        shutil.copytree(tmp_path / split / "Annotations", tmp_path / "A", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / split / "Annotations")
    (tmp_path / "A").rename(tmp_path / "Annotations")
    assert (len(read(tmp_path, "train")), len(read(tmp_path))) == (2, 1)
    write_pair(tmp_path / "val", 1)
    shutil.rmtree(tmp_path / "val/Annotations")
    with pytest.raises(TrainerError, match=r"val/.*image_1\.png: has the id of .*trai"):
        read(tmp_path)  # which image CSO1.xml is of, nobody can say


# --- which split is taken ---------------------------------------------------------------------


def imported(trainer, tmp_path: Path, folder: Path | str, *words: str) -> list[int]:
    """The pixel that `write_split` gave each image that the command took."""
    out = tmp_path / "out.zarr"
    result = trainer("import-csist", folder, out, *words)
    assert result.returncode == 0, result.stderr
    taken = read_csist(out).image[:, 0, 0].tolist()
    shutil.rmtree(out)
    return taken


def write_split(split: Path, *numbers: int) -> None:
    for number in numbers:
        write_pair(split, number, np.full((11, 11), number, np.uint8))


def move_annotations_beside(split: Path) -> None:
    shutil.copytree(split / "Annotations", split.parent / "Annotations", dirs_exist_ok=True)
    shutil.rmtree(split / "Annotations")


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_the_only_split_is_taken_without_a_word(trainer, tmp_path: Path, name: str) -> None:
    write_split(tmp_path / "d" / name, 3, 4)
    assert imported(trainer, tmp_path, tmp_path / "d") == [3, 4]
    move_annotations_beside(tmp_path / "d" / name)
    assert imported(trainer, tmp_path, tmp_path / "d") == [3, 4]


def test_of_several_splits_one_must_be_named(trainer, tmp_path: Path) -> None:
    write_split(tmp_path / "d/train", 3)
    write_split(tmp_path / "d/test", 5)
    result = trainer("import-csist", tmp_path / "d", tmp_path / "out.zarr")
    refused(result, f"{tmp_path / 'd'}: holds train, test; say which with --split")
    assert not (tmp_path / "out.zarr").exists()
    assert imported(trainer, tmp_path, tmp_path / "d", "--split", "train") == [3]
    assert imported(trainer, tmp_path, tmp_path / "d", "--split", "test") == [5]


@pytest.mark.parametrize("name", ["test", "mine"])
def test_a_folder_of_images_is_itself_the_split(trainer, tmp_path: Path, monkeypatch, name) -> None:
    folder = tmp_path / "d" / name
    write_split(folder, 3, 4)
    write_split(tmp_path / "d/train", 5)
    assert imported(trainer, tmp_path, folder) == [3, 4]
    for split in (folder, tmp_path / "d/train"):
        move_annotations_beside(split)
    assert imported(trainer, tmp_path, folder) == [3, 4]
    monkeypatch.chdir(folder)
    assert imported(trainer, tmp_path, ".") == [3, 4]
    monkeypatch.chdir(folder / "cso_img")
    assert imported(trainer, tmp_path, "..") == [3, 4]


def test_a_folder_of_images_goes_before_splits_within_it(trainer, tmp_path: Path) -> None:
    write_split(tmp_path / "d", 3)
    write_split(tmp_path / "d/train", 4)
    assert imported(trainer, tmp_path, tmp_path / "d") == [3]
    assert imported(trainer, tmp_path, tmp_path / "d", "--split", "train") == [4]


def test_annotations_inside_a_split_go_before_those_beside_it(tmp_path: Path) -> None:
    write_split(tmp_path / "test", 3)
    (tmp_path / "Annotations").mkdir()
    beside = HAND_WRITTEN.replace("<yc>8.0", "<yc>1.0")
    (tmp_path / "Annotations/CSO3.xml").write_text(beside)
    for folder in (tmp_path, tmp_path / "test"):
        assert read(folder, None).target_xy_px[0, 0, 0] == 8.0


def test_a_folder_of_images_named_again_with_split_is_refused(trainer, files: Path) -> None:
    result = trainer("import-csist", files / "test", files / "out.zarr", "--split", "test")
    refused(result, "test/test/cso_img: no image_<id>.png")


# --- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["csist-100k", "interior", "field"])
def test_dataset_comes_back_to_the_bit_with_the_options_export_prints(
    trainer, tmp_path: Path, profile: str
) -> None:
    drawn, again = tmp_path / "drawn.zarr", tmp_path / "again.zarr"
    write_csist(drawn, PROFILES[profile], 60, seed=4)
    exported = trainer("export-csist", drawn, tmp_path / "files", "--split", "train")
    assert exported.returncode == 0, exported.stderr
    wrote, told = exported.stdout.splitlines()
    assert wrote == f"wrote {tmp_path / 'files/train'}: 60 images"
    options = shlex.split(told.partition("again with ")[2])
    words = (tmp_path / "files", again, "--split", "train", *options)
    imported = trainer("import-csist", *words)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout == f"wrote {again}: 60 images\n"
    assert_same(read_csist(drawn), read_csist(again))
    assert read_csist(again).seed is None


def test_what_the_files_cannot_hold_is_told_on_export(trainer, tmp_path: Path) -> None:
    write_csist(tmp_path / "d.zarr", PROFILES["field"], 2, seed=4)
    result = trainer("export-csist", tmp_path / "d.zarr", tmp_path)
    assert result.stdout.endswith(
        "the files hold no sensor, profile or seed; import them again with --profile field "
        "--full-scale 16383 --read-noise 6.0 --gain 8.0 --background 1000.0\n"
    )


def test_files_come_back_as_they_were(trainer, tmp_path: Path) -> None:
    write_csist(tmp_path / "drawn.zarr", PROFILES["csist-100k"], 20, seed=5)
    drawn = replace(read_csist(tmp_path / "drawn.zarr"), profile="imported")
    csist_files.write_files(tmp_path / "one", "test", drawn, ignore)
    assert trainer("import-csist", tmp_path / "one", tmp_path / "i.zarr").returncode == 0
    result = trainer("export-csist", tmp_path / "i.zarr", tmp_path / "two")
    assert result.stdout == f"wrote {tmp_path / 'two/test'}: 20 images\n"  # nothing is lost
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "two")) == 40


def test_splits_lie_side_by_side(trainer, tmp_path: Path) -> None:
    for seed, split in enumerate(csist_files.SPLITS):
        write_csist(tmp_path / f"{split}.zarr", PROFILES["interior"], 3, seed)
        words = ("export-csist", tmp_path / f"{split}.zarr", tmp_path / "f", "--split", split)
        assert trainer(*words).returncode == 0
    for split in csist_files.SPLITS:
        drawn = read_csist(tmp_path / f"{split}.zarr")
        assert_same(drawn, read(tmp_path / "f", split, profile="interior"))


def test_empty_and_full_images_come_back(tmp_path: Path) -> None:
    xy_px = np.full((2, 5, 2), np.nan, np.float32)
    xy_px[1] = [[-0.5, 10.5], [1e-7, -0.0], [1 / 3, 2 / 3], [1e-3, 9.999999], [5, 1e7]]
    intensity = np.full((2, 5), np.nan, np.float32)
    intensity[1] = [220, 250, 1e-30, 3e38, np.float32(0.1)]
    data = CsistDataset(
        image=np.zeros((2, 11, 11), np.uint8),
        target_count=np.array([0, 5], np.uint8),
        target_xy_px=xy_px,
        target_intensity=intensity,
        sensor=Sensor(sigma_px=0.1 + 0.2, full_scale=255),
        profile="imported",
        seed=None,
        background=0.0,
    )
    csist_files.write_files(tmp_path, "val", data, ignore)
    assert_same(data, read(tmp_path, "val"))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_written_number_gives_the_same_float32(value: float) -> None:
    text = csist_annotation.format_annotation(0, 0.5, np.array([[value, 0, 0]], np.float32))
    written = text.partition("<yc>")[2].partition("</yc>")[0]
    assert np.float32(float(written)).tobytes() == np.float32(value).tobytes()
    assert len(written) <= 15  # the shortest, not a float64's digits


def test_progress_ends_with_the_last_image(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(csist_files, "PROGRESS_EVERY", 2)
    for number in range(5):
        write_pair(tmp_path / "test", number)
    seen: list[int] = []
    pairs = csist_files.find_pairs(tmp_path / "test")
    data = csist_files.read_pairs(pairs, csist_files.Unwritten(), seen.append)
    csist_files.write_files(tmp_path, "val", data, seen.append)
    assert seen == [2, 4, 5] * 2


# --- faults ----------------------------------------------------------------------------------

IMAGE, ANNOTATION = "test/cso_img/image_8.png", "test/Annotations/CSO8.xml"
FIVE_MORE = "<object>" + HAND_WRITTEN.partition("<object>")[2].partition("</annotation>")[0]
BILLION_LAUGHS = (
    '<!DOCTYPE annotation [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=1))
    + "]>"
)


def image(change: Callable[[], np.ndarray]) -> Callable[[Path], object]:
    return lambda folder: cv2.imwrite(str(folder / IMAGE), change())


def png(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / IMAGE).write_bytes(change((folder / IMAGE).read_bytes()))


def text(old: str, new: str, encoding: str = "utf-8") -> Callable[[Path], object]:
    assert old in HAND_WRITTEN
    changed = HAND_WRITTEN.replace(old, new).encode(encoding)
    return lambda folder: (folder / ANNOTATION).write_bytes(changed)


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (lambda f: (f / ANNOTATION).unlink(), [IMAGE, "no annotation", "add ", "CSO8.xml"]),
        (lambda f: (f / IMAGE).unlink(), [ANNOTATION, "no image", "add ", "image_8.png"]),
        (
            lambda f: shutil.rmtree(f / "test/Annotations"),
            ["image_7.png", "no annotation; add ", "test/Annotations/CSO7.xml"],
        ),
        (lambda f: shutil.rmtree(f / "test/cso_img"), ["test/cso_img", "no image_<id>.png"]),
        (lambda f: [p.unlink() for p in f.rglob("*.png")], ["test/cso_img", "no image_<id>.png"]),
        (lambda f: shutil.rmtree(f), ["original: no such folder"]),
        (
            lambda f: shutil.rmtree(f / "test"),
            ["original: holds neither cso_img/ nor train, val, test"],
        ),
        (lambda f: (f / IMAGE).with_name("image_b.png").touch(), ["image_b.png", "not named"]),
        (
            lambda f: shutil.copy(f / IMAGE, (f / IMAGE).with_name("image_08.png")),
            ["image_8.png: has the id of", "image_08.png", "remove"],
        ),
        (
            lambda f: shutil.copy(f / ANNOTATION, (f / ANNOTATION).with_name("CSO_8.xml")),
            ["CSO_8.xml: has the id of", "CSO8.xml", "remove"],
        ),
        # XML
        (text("</sigma>", ""), [ANNOTATION, "not well-formed", "line 18"]),
        (text(HAND_WRITTEN, ""), [ANNOTATION, "not well-formed"]),
        (text('?xml version="1.0" ', '?xml version="1.0" encoding="x"'), ["not well-formed"]),
        (text("annotation>", "notes>"), [ANNOTATION, "must hold <annotation>, got <notes>"]),
        (text("<sigma>0.5</sigma>", ""), [ANNOTATION, "sigma is missing"]),
        (text("<width>11</width>", ""), [ANNOTATION, "size/width is missing"]),
        (text("<yc>8.0</yc>", ""), [ANNOTATION, "object 1: coordinate/yc is missing; add it"]),
        (text("coordinate>", "place>"), [ANNOTATION, "object 1: coordinate/xc is missing"]),
        (text("<xc>2.25", "<xc>two"), [ANNOTATION, "object 1: coordinate/xc", "got 'two'"]),
        (text("<xc>2.25", "<xc>"), ["coordinate/xc must be a finite number, got ''"]),
        (text("<yc>8.0", "<yc>nan"), [ANNOTATION, "coordinate/yc must be a finite", "'nan'"]),
        (text("240", "inf"), [ANNOTATION, "coordinate/brightness must be a finite", "'inf'"]),
        (text("240", "1e39"), ["coordinate/brightness must be a finite", "'1e39'"]),
        (text("<sigma>0.5", "<sigma>nan"), [ANNOTATION, "sigma must be a finite", "'nan'"]),
        (text("<sigma>0.5", "<sigma>0.6"), [ANNOTATION, "sigma is 0.6", "first file 0.5"]),
        (text("<width>11", "<width>9"), [ANNOTATION, "size is 9×11, the image is 11×11"]),
        (text("</annotation>", FIVE_MORE * 5 + "</annotation>"), [ANNOTATION, "has 6 targets"]),
        (text("<annotation>", BILLION_LAUGHS + "<annotation>&i;"), [ANNOTATION, "has a DOCTYPE"]),
        (
            text("<annotation>", BILLION_LAUGHS + "<annotation>&i;", "utf-16"),
            [ANNOTATION, "has a DOCTYPE, which no annotation needs; remove it"],
        ),
        (
            text("<annotation>", '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation>'),
            [ANNOTATION, "has a DOCTYPE"],
        ),
        (text("2.25", "&a;"), [ANNOTATION, "undefined entity"]),
        # PNG
        (png(lambda data: data[:-12]), [IMAGE, "truncated", "copy it again"]),
        (png(lambda data: data[: len(data) // 2]), [IMAGE, "truncated"]),
        (png(lambda data: data[:20]), [IMAGE, "truncated"]),
        (png(lambda data: b""), [IMAGE, "not a PNG"]),
        (png(lambda data: b"GIF89a" + data), [IMAGE, "not a PNG"]),
        (png(lambda data: data[:60] + b"x" + data[61:]), [IMAGE, "damaged"]),
        (image(lambda: np.dstack([PLAIN] * 3)), [IMAGE, "grey", "got 8-bit colour"]),
        (image(lambda: np.dstack([PLAIN] * 4)), [IMAGE, "grey", "got 8-bit colour"]),
        (image(lambda: PLAIN[:9]), [IMAGE, "must be 11×11 pixels, got 11×9"]),
        (image(lambda: PLAIN.astype(np.uint16)), [IMAGE, "bits is 16, in the first file 8"]),
        (lambda f: [(f / IMAGE).unlink(), (f / IMAGE).mkdir()], [IMAGE, "cannot be read"]),
    ],
)
def test_a_fault_in_the_files_is_one_line(
    trainer, files: Path, spoil: Callable[[Path], object], fragments: list[str]
) -> None:
    spoil(files)
    refused(trainer("import-csist", files, files.parent / "out.zarr"), *fragments)
    assert set(files.parent.iterdir()) <= {files}  # nothing half-written


def test_black_and_white_png_is_refused_not_stretched(files: Path) -> None:
    bits = [cv2.IMWRITE_PNG_BILEVEL, 1]
    cv2.imwrite(str(files / IMAGE), (PLAIN > 60).astype(np.uint8) * 255, bits)
    with pytest.raises(TrainerError, match=r"image_8\.png: must be .*, got 1-bit grey"):
        read(files)


def test_deeply_nested_xml_does_no_harm(files: Path) -> None:
    depth = 100_000
    (files / ANNOTATION).write_text("<annotation>" + "<a>" * depth + "</a>" * depth)
    with pytest.raises(TrainerError, match=r"CSO8\.xml: not well-formed XML \(no elem"):
        read(files)


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("--split tset", ["--split: no `tset`", "train, val, test"]),
        ("--split val", ["val/cso_img: no image_<id>.png", "another DIR or --split"]),
        ("--gain 0", ["gain", "positive electrons per DN"]),
        ("--read-noise inf", ["read_noise", "got inf", "correct the option"]),
        ("--background inf", ["--background", "got inf"]),
        ("--background -1", ["--background"]),
        ("--full-scale 70000", ["--full-scale"]),
        ("--full-scale 100", ["image_7.png", "a pixel of 120", "--full-scale"]),
    ],
)
def test_a_wrong_option_is_one_line(trainer, files: Path, words: str, fragments) -> None:
    refused(trainer("import-csist", files, files.parent / "o.zarr", *words.split()), *fragments)
    assert list(files.parent.iterdir()) == [files]


def test_sigma_beyond_reason_is_refused(files: Path) -> None:
    for path in (files / "test/Annotations").iterdir():
        path.write_text(HAND_WRITTEN.replace("<sigma>0.5", "<sigma>50"))
    with pytest.raises(TrainerError, match=r"must be from 0\.1 to 5 px.*CSO7\.xml"):
        read(files)


def test_nothing_is_overwritten(trainer, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    assert trainer("import-csist", files, out).returncode == 0
    before = contents(tmp_path)
    refused(trainer("import-csist", files, out), "out.zarr", "exists already")
    refused(trainer("export-csist", out, files), "original/test", "exists already")
    assert contents(tmp_path) == before


def test_export_of_a_wrong_dataset_is_one_line(trainer, files: Path, tmp_path: Path) -> None:
    refused(trainer("export-csist", tmp_path / "no.zarr", tmp_path / "f"), "no.zarr", "no such")
    save_csist(tmp_path / "empty.zarr", empty(read(files)))
    refused(trainer("export-csist", tmp_path / "empty.zarr", tmp_path / "f"), "no images")
    save_csist(tmp_path / "d.zarr", read(files))
    (tmp_path / "f").touch()
    refused(trainer("export-csist", tmp_path / "d.zarr", tmp_path / "f"), "f/test", "cannot be")
    refused(trainer("export-csist", tmp_path / "d.zarr", tmp_path, "--split", "x"), "no `x`")


def empty(data: CsistDataset) -> CsistDataset:
    names = ("image", "target_count", "target_xy_px", "target_intensity")
    return replace(data, **{name: getattr(data, name)[:0] for name in names})


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(28, "No space left"), "TrainerError"), (KeyboardInterrupt, "")]
)
def test_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch, error, raised) -> None:
    write_pair(tmp_path / "test", 1)
    data = read(tmp_path)

    def fail(done: int) -> None:
        assert [path.name for path in tmp_path.glob(".val.*")] != []  # it was under way
        raise error

    with pytest.raises((TrainerError, KeyboardInterrupt)) as caught:
        csist_files.write_files(tmp_path, "val", data, fail)
    assert raised in caught.typename
    assert [path.name for path in tmp_path.iterdir()] == ["test"]
