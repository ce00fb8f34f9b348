"""One cache on several devices: a process for each, a part of the cache in each, merged as `crosscoders merge` does.

The parts lie in OUT/parts/1-of-2 and so on until all are finished, so a run that ends goes on with the same number of
devices. The first process that fails ends the run: the others are asked to stop, and keep their whole shards.
"""

import contextlib
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crosscoders.activations.merge import merge_point
from crosscoders.activations.plan import Plan
from crosscoders.activations.settings import CacheConfig, Part
from crosscoders.activations.shards import ShardWriter
from crosscoders.activations.writer import SECONDS_BETWEEN_LINES, Rates, part_folder, stopped_by_sigterm, write_caches
from crosscoders.common.errors import CorruptData, EnvironmentFault, InputError
from crosscoders.common.folders import Folder, RemoteFolder, open_folder
from crosscoders.common.progress import Progress, say

Processes = dict[Connection, tuple[str, BaseProcess]]
"""Device and process at the other end of each pipe."""
START_METHOD = "spawn"
"""CUDA does not survive a fork."""
FAULTS = {fault.exit_status: fault for fault in (InputError, EnvironmentFault, CorruptData)}


class Failed(NamedTuple):
    """What a process says of its end, when it is not `Rates`."""

    status: int
    message: str


def count_parts(config: CacheConfig, devices: list[str]) -> int:
    """Return the number of parts: one for each device, but no more than there are shards."""
    return min(len(devices), -(-config.n_tokens // config.shard_tokens))


def require_parts(folder: Folder, n_parts: int | None) -> None:
    """Raise InputError when a run on another number of devices, or on devices at all (None), was begun there, or when
    the folder is not one for several devices."""
    if isinstance(folder, RemoteFolder):
        if n_parts is not None:
            raise InputError(f"devices need a local --out, not {folder}. Use --part and `crosscoders merge`.")
        return
    counts = sorted(name.partition("-of-")[2] for name in open_folder(f"{folder}/parts").subfolders())
    if counts and counts[0] != str(n_parts):
        raise InputError(
            f"{folder} was begun with {counts[0]} devices. Give as many --devices to go on, or remove {folder}/parts."
        )


def write_on_devices(config: CacheConfig, plan: Plan, devices: list[str]) -> Rates:
    """Write what is missing of every hook point of a plan, a part on each device.

    Raises:
        InputError: `out` holds what was begun in another way.
        EnvironmentFault, CorruptData: what a process has raised; the device is named.
    """
    n_parts = count_parts(config, devices)
    if len(devices) > n_parts:
        say(f"the cache has {n_parts} shards, so {n_parts} of {len(devices)} devices work.")
    parts = [Part(number, n_parts) for number in range(1, n_parts + 1)]
    with contextlib.ExitStack() as stack:
        writers = [ShardWriter(point, open_folder(point.out), plan, None) for point in config.points()]
        for writer in writers:
            stack.enter_context(writer.folder.exclusive())
            writer.resume()
            if writer.is_complete:
                say(f"{writer.folder} is complete already.")
            elif writer.shards:
                raise InputError(
                    f"{writer.folder} was begun without --devices. Go on without it, or choose another --out."
                )
        points = [writer.config for writer in writers if not writer.is_complete]
        if not points:
            return Rates()
        missing = [
            part
            for part in parts
            if any("part.json" not in open_folder(part_folder(point.out, part)).sizes() for point in points)
        ]
        remaining = replace(config, hook_point=[str(point.hook_point) for point in points])
        remaining = config if isinstance(config.hook_point, str) else remaining
        rates = _run_all(remaining, plan, list(zip(devices, missing, strict=False))) if missing else Rates()
        for point in points:
            folders = [open_folder(part_folder(point.out, part)) for part in parts]
            merge_point(folders, open_folder(point.out), point.out)
            shutil.rmtree(Path(point.out) / "parts")
    return rates


def _run_all(config: CacheConfig, plan: Plan, work: list[tuple[str, Part]]) -> Rates:
    context: Any = multiprocessing.get_context(START_METHOD)
    processes: Processes = {}
    with _ended(processes):
        for device, part in work:
            receiver, sender = context.Pipe(duplex=False)
            arguments = (config, plan, part, device, sender, torch.get_num_threads())
            started = context.Process(target=_work, args=arguments, name=f"cache-{device}", daemon=True)
            started.start()
            sender.close()
            processes[receiver] = device, started
        progress = Progress("cache", total=config.n_tokens, unit="tok")
        began = told = time.perf_counter()
        all_rates: list[Rates] = []
        running = dict(processes)
        while running:
            for end in [end for end in wait(list(running)) if isinstance(end, Connection)]:
                device, process = running[end]
                try:
                    said: Any = end.recv()
                except EOFError:
                    process.join()
                    raise EnvironmentFault(
                        f"the process on {device} ended with status {process.exitcode}. Whole shards are kept. "
                        "Run the same command to go on."
                    ) from None
                if isinstance(said, Failed):
                    raise FAULTS.get(said.status, EnvironmentFault)(f"on {device}: {said.message}")
                if isinstance(said, Rates):
                    all_rates.append(said)
                    del running[end]
                else:
                    progress.update(said)
                    now = time.perf_counter()
                    if now - told > SECONDS_BETWEEN_LINES:
                        told = now
                        rate = progress.done / (now - began)
                        say(f"cached {progress.done:,} of {config.n_tokens:,} tokens  {rate:,.0f} tok/s")
        progress.close()
    # Wall time is that of the slowest; each waited for its own writer.
    return Rates(
        sum(rates.n_tokens for rates in all_rates),
        sum(rates.n_bytes for rates in all_rates),
        max(rates.seconds for rates in all_rates),
        sum(rates.wait_seconds for rates in all_rates) / len(all_rates),
    )


@contextlib.contextmanager
def _ended(processes: Processes) -> Iterator[None]:
    """End every process when the block ends; after a failure they are asked to stop first."""
    try:
        yield
    except BaseException:
        for _, process in processes.values():
            process.terminate()
        raise
    finally:
        for end, (_, process) in processes.items():
            process.join()
            end.close()


def _work(config: CacheConfig, plan: Plan, part: Part, device: str, parent: Connection, n_threads: int) -> None:
    """Write the part in a process of its own, and say what came of it."""
    torch.set_num_threads(n_threads)
    try:
        with stopped_by_sigterm():
            parent.send(write_caches(config, plan, part, device=device, report=parent.send))
    except (InputError, EnvironmentFault, CorruptData) as error:
        parent.send(Failed(error.exit_status, str(error)))
    except KeyboardInterrupt:
        pass  # the parent stops, and says so
