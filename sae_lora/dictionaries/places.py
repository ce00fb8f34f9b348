"""Where a dictionary sits: by its files, or by the user's word."""

from pathlib import Path

from crosscoders.common.errors import InputError
from crosscoders.models import points


def chosen_hook_point(recorded: str | None, given: str | None, path: str | Path, model_type: str | None) -> str:
    """Return where a dictionary sits: as its files say or, where they say nothing that can be run, as the user does.

    Raises:
        InputError: nobody says it, or both do and differ.
    """
    named = None if recorded is None else points.known_as(recorded, model_type)
    asked = None if given is None else points.known_as(given, model_type) or given
    if named is None and asked is None:
        says = "does not say its hook point" if recorded is None else f"sits at {recorded!r}, which cannot be run"
        raise InputError(
            f"{str(path)!r} {says}. Give it: --hook-point blocks.12.hook_resid_post, or as the files say where they "
            "come from."
        )
    if named is not None and asked is not None and named != asked:
        raise InputError(f"{str(path)!r} belongs to hook_point {named!r}, not {asked!r}. Leave out the hook point.")
    return str(named or asked)
