"""Step 2 of the data flow, middle: a config -> caches on disk, in one process, in parts, or on several devices.

`run_cache` plans, checks and writes; `cache_activations` is the same for one cache. The same plan gives the same bytes
whether or not the run was interrupted, at one hook point or at several, in one process or in parts that are merged.
"""

from typing import NamedTuple

from crosscoders.activations import needs
from crosscoders.activations.cache import ActivationCache
from crosscoders.activations.parallel import count_parts, require_parts, write_on_devices
from crosscoders.activations.plan import make_plan
from crosscoders.activations.settings import CacheConfig, Part
from crosscoders.activations.shards import bytes_per_token
from crosscoders.activations.writer import Rates, stopped_by_sigterm, write_caches
from crosscoders.common import files, memory
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import InputError
from crosscoders.common.folders import open_folder
from crosscoders.common.progress import say


class CacheRun(NamedTuple):
    """What `run_cache` leaves behind."""

    folders: dict[str, str]
    """Folder of the cache, or of the part, at each hook point."""
    rates: Rates


def cache_activations(config: CacheConfig) -> ActivationCache:
    """Write the cache that `config` describes, or go on with it, and return it opened.

    Raises:
        InputError: anything that the user's settings or data get wrong; a cache made with other settings is there;
            several hook points (then `run_cache`).
        EnvironmentFault: too little space, a second writer.
        CorruptData: a non-finite activation.
    """
    if not isinstance(config.hook_point, str):
        raise InputError("cache_activations makes one cache; for several hook points call crosscoders.run_cache.")
    return ActivationCache(run_cache(config).folders[config.hook_point])


def run_cache(
    config: CacheConfig, *, part: Part | None = None, devices: list[str] | None = None, force: bool = False
) -> CacheRun:
    """Write the caches that `config` describes, one for each hook point, or one part of each, or go on with them.

    devices: a process for each, in place of the config's device; with them there is no `part`.
    force: as in `memory.require`.

    Raises: as `cache_activations`.
    """
    with stopped_by_sigterm():
        chosen = [choose_device(name) for name in devices or [config.device]]
        points = config.points()
        for point in points:
            require_parts(open_folder(point.out), count_parts(config, devices) if devices else None)
        plan = make_plan(config)
        n_skipped = plan.rows.counts["skipped_tokens"]
        if config.skip_first is None and n_skipped:
            say(
                f"{n_skipped:,} rows do not begin with a beginning-of-sequence token: their first position is left out "
                "(--skip-first 0 keeps it)."
            )
        if n_cut := plan.rows.counts["cut_tokens"]:
            say(f"{n_cut:,} tokens beyond context_length = {config.context_length} of their documents are left out")
        n_bytes = config.n_tokens * bytes_per_token(config, plan.info.d_model) * len(points)
        needed = memory.require(
            [needs.cache_need(config, plan, n_points=len(points), device=device) for device in chosen],
            "Lower batch_rows, context_length or shard_tokens, or name fewer hook points.",
            force=force,
        )
        say(
            f"cache {config.base} and {config.tuned} at {', '.join(str(point.hook_point) for point in points)}: "
            f"{f'part {part} of ' if part else ''}{config.n_tokens:,} tokens, {files.size_text(n_bytes)} to "
            f"{config.out}{f' on {len(chosen)} devices' if devices else ''}; needs {needed}"
        )
        rates = write_on_devices(config, plan, devices) if devices else write_caches(config, plan, part)
        return CacheRun({str(point.hook_point): point.out for point in points}, rates)
