"""Errors that reach a person: one line that says what, where and how to mend it."""


class PipelineError(Exception):
    """Bad input: a file, a setting, an endpoint. Exit code 2."""

    exit_code = 2


class RunError(PipelineError):
    """A run that began well and failed. Exit code 1."""

    exit_code = 1
