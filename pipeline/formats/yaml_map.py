"""Configuration files: YAML maps of named things, whatever else a file may hold."""

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import PipelineError


def read_yaml_map(path: Path) -> dict[str, Any]:
    """What a file says, nothing being an empty map; raises PipelineError naming the file."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PipelineError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # Beside its own errors PyYAML lets through what odd scalars (2001-99-99, !!int "",
        # !!timestamp x) and deep nesting trip over.
        first = " ".join(str(error).split())
        raise PipelineError(f"{path}: not valid YAML: {first}") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise PipelineError(f"{path}: the configuration must be a map of named sections")
    return data
