"""Errors that a user can cause. Every message is one line: what is wrong with which value, what to do.

The command line prints the message and leaves with `exit_status`; anything else that is raised is our own bug and
keeps its traceback.
"""


class InputError(ValueError):
    """A value, file or combination of settings that the user gave is wrong."""

    exit_status = 2


class EnvironmentFault(RuntimeError):
    """The machine cannot do it now: no space left, a second writer, a device that is not there."""

    exit_status = 3


class CorruptData(RuntimeError):
    """Bytes that were read, or numbers that were computed, are not what they should be."""

    exit_status = 4


class Stopped(KeyboardInterrupt):
    """SIGTERM came. Like Ctrl-C it is raised wherever the main thread stands."""

    exit_status = 143


def nearest(word: str, choices: list[str]) -> str:
    """Return the end of a sentence: `; did you mean 'x'?` for the closest choice, or `.` when nothing is close."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."
