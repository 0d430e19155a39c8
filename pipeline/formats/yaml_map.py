"""Configuration files: YAML maps of named things, whatever else a file may hold."""

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import PipelineError

MERGE = "tag:yaml.org,2002:merge"


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key given twice in one map, of which YAML would keep the last; `<<` may be."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise PipelineError(f"line {line}: `{key.value}` is given twice; leave one out")
            seen.add((key.tag, key.value))
        return node


def read_yaml_map(path: Path) -> dict[str, Any]:
    """What a file says, nothing being an empty map; raises PipelineError naming the file."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except PipelineError as error:
        raise PipelineError(f"{path}: {error}") from error
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
