"""One command, run for real: in a forked copy of this process, with arguments, signals, pipes and limits of its own.

A fork has everything imported already, so that hundreds of runs take minutes. What it prints goes to a file; a change
that only the fork sees (a clock that stands still, a write that is cut off) is made in `before`.
"""

import contextlib
import importlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PROGRAMS = {"crosscoders": "crosscoders.cli", "diffing": "diffing.cli", "sae-lora": "sae_lora.cli"}
LIMIT_S = 300.0


class Seen(NamedTuple):
    """What one command left behind for who called it."""

    status: int
    """Exit status; of a run that a signal ended, minus the signal; 124 where it was ended for taking too long."""
    output: str
    """stdout and stderr in one."""

    @property
    def message(self) -> str:
        """The last line of what was printed."""
        return (self.output.strip().splitlines() or [""])[-1]

    @property
    def is_refusal(self) -> bool:
        """Whether it is one line that says what is wrong, with a status of its own and no traceback."""
        errors = re.findall(r"^error: .+$", self.output, re.MULTILINE)
        return self.status in (2, 3, 4) and len(errors) == 1 and "Traceback" not in self.output


def preload() -> None:
    """Import here what commands import, so that forks need not."""
    import jsonargparse  # noqa: F401
    import pandas
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import transformers

    for module in PROGRAMS.values():
        for command in importlib.import_module(module).COMMANDS:
            importlib.import_module(command.run.split(":")[0])
    for name in ("AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForCausalLM", "Gemma2ForCausalLM"):
        getattr(transformers, name)
    pandas.DataFrame({"a": [1]})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of a fork are gone


def play(
    line: list[str],
    *,
    before: Callable[[], None] | None = None,
    meanwhile: Callable[[int], None] | None = None,
    limit_s: float = LIMIT_S,
) -> Seen:
    """Run one command line, such as ["crosscoders", "eval", ...].

    before: is called in the fork before the command. meanwhile: is called here with the id of its process.
    """
    with tempfile.TemporaryFile() as printed:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Python 3.12 warns of threads, which wait for work here
            process = os.fork()
        if process == 0:
            _run(line, printed.fileno(), before)
        if meanwhile is not None:
            meanwhile(process)
        status = _wait(process, limit_s)
        printed.seek(0)
        return Seen(status, printed.read().decode(errors="replace"))


def _run(line: list[str], printed: int, before: Callable[[], None] | None) -> None:
    """Be the command, and end with its status."""
    status = 1
    try:
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdout = os.fdopen(os.dup(1), "w")
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if before is not None:
            before()
        status = importlib.import_module(PROGRAMS[line[0]]).main(line[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _wait(process: int, limit_s: float) -> int:
    deadline = time.monotonic() + limit_s
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return 124
        time.sleep(0.005)


def when(ready: Callable[[], bool], number: int) -> Callable[[int], None]:
    """Return a `meanwhile` that sends a signal as soon as `ready`, if the process still runs then."""

    def send(process: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not ready() and time.monotonic() < deadline:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.002)
        os.kill(process, number)

    return send


def kill_at(module: object, name: str, when_path: Callable[[str], bool]) -> Callable[[], None]:
    """Return a `before` that kills the process at a call of `module.name` whose second argument fulfils `when_path`."""

    def patch() -> None:
        real = getattr(module, name)

        def dying(source: object, target: object, *rest: object, **named: object) -> object:
            if when_path(str(target)):
                if name == "copyfile":  # half of it was there already
                    data = Path(str(source)).read_bytes()
                    Path(str(target)).write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(source, target, *rest, **named)

        setattr(module, name, dying)

    return patch
