"""Where what was compiled is kept, so that the next start need not compile it again."""

import os
import stat
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """A folder of this user's own, e.g. ~/.cache/irst-pipeline/openvino; None if there is none.

    What is kept there runs as a program, so a folder others could write to is not used.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "irst-pipeline" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat()
    except (OSError, RuntimeError):
        return None
    others = mode.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    own = mode.st_uid == os.getuid() and os.access(folder, os.W_OK)
    return folder if own and not others else None
