"""`trainer bench` at a tiny size: what runs where there is no GPU, and the files it writes."""

import json
from pathlib import Path

import pytest
from conftest import assert_one_line_error

from trainer.bench import PLAIN


def test_every_backend_is_measured_beside_plain_torch(command, tmp_path: Path) -> None:
    result = command(
        *("trainer", "bench", "--engine", "off_grid_any", "--out", tmp_path, "--seconds", "0.02"),
        *("--batch", "1", "--batch", "5"),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["cores"] >= 1 and found["rival"] == PLAIN
    rows = found["rows"]
    assert {row["batch"] for row in rows} == {1, 5}
    assert {PLAIN, "openvino f32", "torch f32", "torch bf16"} <= {row["runs"] for row in rows}
    assert all(row["ratio"] == 1.0 for row in rows if row["runs"] == PLAIN)
    for row in rows:
        assert 0.0 < row["p50_ms"] <= row["p99_ms"]
        assert row["patches_per_s"] == pytest.approx(row["batch"] / row["p50_ms"] * 1e3)
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert "tensorrt" in result.stderr and "not here" in result.stderr
    assert "openvino f32" in result.stdout


@pytest.mark.patient
def test_a_network_at_full_size_needs_no_weights(command, tmp_path: Path) -> None:
    result = command(
        *("trainer", "bench", "--network", "focus", "--out", tmp_path, "--seconds", "0.02"),
        *("--batch", "2"),
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["network"] for row in rows} == {"focus"}
    assert {PLAIN, "openvino f32", "torch f32", "torch bf16"} <= {row["runs"] for row in rows}


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--engine", "nothing"], ["no `nothing`"]),
        (["--engine", "off_grid.openvino"], ["name the portable one"]),
        (["--network", "nothing"], ["no `nothing`"]),
        (["--batch", "0"], ["--batch"]),
    ],
)
def test_a_mistake_is_one_line(command, tmp_path: Path, words, fragments) -> None:
    assert_one_line_error(command("trainer", "bench", "--out", tmp_path, *words), *fragments)
