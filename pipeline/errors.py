"""Errors that reach a person: one line that says what, where and how to mend it."""


class PipelineError(Exception):
    """Bad input: a file, a setting, an endpoint. Exit code 2."""

    exit_code = 2


class RunError(PipelineError):
    """A run that began well and failed. Exit code 1."""

    exit_code = 1


class Unavailable(RunError):
    """What a run needs is not there now, a camera or an address; trying again may mend it."""


def told(error: Exception) -> str:
    """What a person is told of an error, as one line: ours say it all, others need their name."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineError) else f"{type(error).__name__}: {text}"


def printable(text: str) -> str:
    """Text of others as one line, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
