"""Errors a user of the trainer can mend; the command line prints them as one line."""

from pipeline.errors import PipelineError


class TrainerError(PipelineError):
    """Bad input: what, where, and how to mend it. Exit code 2."""


class TrainingFailed(TrainerError):
    """A run that began well and failed. Exit code 1."""

    exit_code = 1
