"""Reading files of tensors: plain types only, never code, and one line when it cannot be done."""

from pathlib import Path
from typing import Any

import torch

from trainer.errors import TrainerError


def read_tensors(path: Path, keys: set[str], what: str, remedy: str) -> dict[str, Any]:
    """The map in a file that torch.save wrote, if it has at least `keys`.

    Raises TrainerError: `what` it should be ("checkpoint"), `remedy` how to get one.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainerError(f"{path}: no such {what}; {remedy}") from error
    except Exception as error:  # an unpickler meets damage with whatever it hits
        raise TrainerError(
            f"{path}: not a readable {what}, truncated perhaps; restore it, or {remedy}"
        ) from error
    if not isinstance(data, dict) or not keys <= data.keys():
        raise TrainerError(f"{path}: not a {what}; {remedy}")
    return data
