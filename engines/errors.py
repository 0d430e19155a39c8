"""What can go wrong with an engine, told so that a person can mend it."""

from pydantic import ValidationError


class EngineError(Exception):
    """An engine that cannot be used: one line, what, where and how to mend it. Exit code 2."""

    exit_code = 2


class NoEngineFits(EngineError):
    """None of the shipped engines was made for such a sensor."""


def first_fault(error: ValidationError) -> str:
    """The first fault pydantic found, as one line that names the field."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown field `{place}`"
    if fault["type"] == "missing":
        return f"field `{place}` is missing"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{place}: {message}, got {fault['input']!r}" if place else message
