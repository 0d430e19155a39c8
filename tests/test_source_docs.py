"""docs/sources.md says what the code does: its configurations are valid, its table is complete."""

import re
from pathlib import Path

import pytest

from pipeline.component import available
from pipeline.config import load_config
from pipeline.formats.foreign import READERS
from pipeline.imaging.pixel_formats import BITS
from pipeline.transport.feed import FrameHeader

TEXT = (Path(__file__).parents[1] / "docs" / "sources.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
def test_every_configuration_is_valid(block, tmp_path):
    (tmp_path / "config.yaml").write_text(block)
    load_config(tmp_path / "config.yaml")


def test_the_table_of_the_message_names_every_field():
    table = TEXT.split("The map of `irst.frame/1`:")[1].split("\n\n")[1]
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert named == list(FrameHeader.__struct_fields__)


def test_every_source_pixel_format_and_kind_of_file_is_named():
    for name in available("source"):
        assert f"| `{name}` |" in TEXT
    for pixel_format in BITS:
        assert pixel_format in TEXT
    for module in set(READERS.values()) - {"images"}:
        assert module.upper() in TEXT
