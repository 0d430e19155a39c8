"""Backends, one file each; a file's name is the backend's name, its class the name in CamelCase."""

import sys
from typing import Any, cast

# `import openvino` reports the import to its maker over the network, unless the package that does
# so cannot be imported. A sensor's computer calls nobody.
cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
