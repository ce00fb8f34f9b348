"""Faults that come to a command while it runs: signals, kills, pipes, full disks, locks, clocks and odd names."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults.inputs import DATA, World, cache_line, fit_line, train_line
from benchmarks.faults.play import Seen, kill_at, play, when
from benchmarks.faults.rows import REFUSED, Expected, edited, refused
from crosscoders.common import files
from diffing.demo import ASSETS

Named = Iterator[tuple[str, Expected]]
HALF_SECOND = (0.05, 0.15, 0.3, 0.5)
"""When Ctrl-C comes, after the start of a process."""


def equal(first: Path | str, second: Path | str) -> bool:
    """Return whether two files have the same bytes."""
    return Path(first).is_file() and files.written(Path(first)) == files.written(Path(second))


def same_cache(folder: Path | str, world: World) -> bool:
    """Return whether a cache has the shards and statistics of the one that nothing happened to."""
    paths = [Path(place) / "manifest.json" for place in (folder, world.at("cache"))]
    if not all(path.is_file() for path in paths):
        return False
    first, second = (json.loads(path.read_text()) for path in paths)
    return all(first[key] == second[key] for key in ("shards", "statistics", "counts"))


def kills(world: World, folder: Path) -> Named:
    """Play kill -9, and the same command again, which has to give what an uninterrupted one gives."""
    cache, run = folder / "cache", folder / "run"
    play(cache_line(str(cache)), meanwhile=when(lambda: (cache / "sums-00001.json").exists(), signal.SIGKILL))
    again = play(cache_line(str(cache)))
    yield "23 kill -9 while caching", Expected(again, (0,), "", same_cache(cache, world))
    train = train_line(world.at("cache"), str(run))
    state = run / "step-00000020" / "manifest.json"
    play(train, meanwhile=when(state.exists, signal.SIGKILL))
    again, whole = play(train), Path(world.at("run"))
    same = equal(run / "model.safetensors", whole / "model.safetensors")
    yield "24 kill -9 while training", Expected(again, (0,), "", same)
    yield "28 the same command once more", Expected(play(train), (0,), "is complete already", same)
    shutil.rmtree(run)
    play(train, before=kill_at(os, "replace", lambda target: "step-00000040" in target))
    again = play(train)
    same = equal(run / "model.safetensors", whole / "model.safetensors")
    yield "25 kill -9 in the rename of a state", Expected(again, (0,), "", same)
    begun = Path(shutil.copytree(world.at("begun"), folder / "begun"))
    (begun / "shard-00001.safetensors").unlink()
    again = play(cache_line(str(begun)))
    yield "15 a finished shard is lost before the rest", Expected(again, (0,), "", same_cache(begun, world))
    url = folder / "bucket"
    torn = kill_at(shutil, "copyfile", lambda target: target.endswith("manifest.json"))
    play(cache_line(f"file://{url}"), before=torn)
    cut = (url / "manifest.json").is_file() and (url / "progress.json").is_file()
    again = play(cache_line(f"file://{url}"))
    yield "15 a torn upload of the manifest", Expected(again, (0,), "", cut and same_cache(url, world))


def scales(world: World, folder: Path) -> Named:
    """Play a scale that is killed over an older one; whatever reads its files has to refuse the mixture."""
    run = Path(shutil.copytree(world.at("run"), folder / "run"))
    cache = f"--cache={world.at('cache')}"
    line = ["diffing", "scale", str(run), "--n-tokens=1000", cache]
    play(line, before=kill_at(os, "replace", lambda target: target.endswith("latents.json")))
    for name, more in (("report", []), ("lens", [cache]), ("causal", [cache, "--n-documents=20"])):
        yield f"15 {name} of two scales mixed", refused(["diffing", name, str(run), *more], "latents.json describes")
    with files.exclusive(run):
        yield "44 two writers of one run", refused(line, "is being written by")
    (run / ".lock").write_text("process 4000000 on elsewhere")
    yield "45 the lock of a process that is gone", Expected(play(line), (0,), "")
    (run / "lens.json").unlink(missing_ok=True)
    (run / "lens.json").mkdir()
    seen = play(["diffing", "lens", str(run), cache, "--json"])
    yield (
        "22 a result that cannot be written is printed",
        Expected(seen, (0,), '"latents": .*', "warning" in seen.output),
    )


def signals(world: World, folder: Path) -> Named:
    """Play SIGTERM and Ctrl-C, and readers that go away."""
    whole = Path(world.at("run")) / "model.safetensors"
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = folder / number.name
        line = train_line(world.at("cache"), str(run))
        seen = play(line, meanwhile=when((run / "step-00000020" / "manifest.json").exists, number))
        again = play(line)
        same = again.status == 0 and equal(run / "model.safetensors", whole)
        yield (
            f"26 {number.name} while training",
            Expected(seen, (status, 0), "", same and "Traceback" not in seen.output),
        )
    steer = ["diffing", "steer", world.at("run"), "--latent=1", "--prompt=Who are you?"]
    seen = play(steer, before=_slow_answers, meanwhile=_interrupted_after_seconds)
    yield "15 Ctrl-C in steer", Expected(seen, (130,), "error: interrupted", "Traceback" not in seen.output)
    for delay in HALF_SECOND:
        seen = play_process(["eval", world.at("run"), "--cache", world.at("cache")], interrupt_after=delay)
        fine = Expected(seen, (130, -signal.SIGINT), "", "crosscoders" not in seen.output)
        yield f"15 Ctrl-C after {delay} s", fine
    run = folder / "piped"
    seen = play(train_line(world.at("cache"), str(run)), before=_nobody_reads)
    yield "15 nobody reads stderr", Expected(seen, (0,), "", equal(run / "model.safetensors", whole))


def _slow_answers() -> None:
    from diffing.causal import steering

    vars(steering)["greedy"] = lambda *_, **__: time.sleep(60)


def _interrupted_after_seconds(process: int) -> None:
    time.sleep(3)
    os.kill(process, signal.SIGINT)


def _nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 2)


def play_process(words: list[str], *, interrupt_after: float | None = None, **changes: str) -> Seen:
    """Run `crosscoders` in a process of its own, with other environment variables, or Ctrl-C after some seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "crosscoders", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env={name: value for name, value in {**os.environ, **changes}.items() if value},
        preexec_fn=_hears_ctrl_c,
    )  # fmt: skip
    if interrupt_after is not None:
        time.sleep(interrupt_after)
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    return Seen(process.returncode, output)


def _hears_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it


def limits(world: World, folder: Path) -> Named:
    """Play memory and files that may not grow, a clock that stands still, a path under a file."""
    line = train_line(world.at("cache"), str(folder / "large"), **{"crosscoder.dict_size": 400_000})
    yield "46 out of memory", Expected(play(line, before=_little_memory), REFUSED, "out of memory|this needs about")
    cache = folder / "full"
    seen = play(cache_line(str(cache)), before=_small_files)
    again = play(cache_line(str(cache)))
    full = Expected(seen, REFUSED, "no space left", again.status == 0 and same_cache(cache, world))
    yield "21 no space in the middle of a shard", full
    (folder / "file").write_text("")
    yield "22 --out under a file", refused(cache_line(str(folder / "file" / "cache")), "cannot write")
    seen = play(cache_line(str(folder / "still")), before=_still_clock)
    yield "15 a clock that stands still, caching", Expected(seen, (0,), "", same_cache(folder / "still", world))
    seen = play(train_line(world.at("cache"), str(folder / "run")), before=_still_clock)
    yield "15 a clock that stands still, training", Expected(seen, (0,), "")


def _little_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))


def _small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))


def _still_clock() -> None:
    time.perf_counter = lambda: 1.0


def names(world: World, folder: Path) -> Named:
    """Play names of files, locales and data folders that are unusual."""
    odd = folder / "a b 'ö' \n"
    seen = play(cache_line(str(odd)))
    yield "51 blanks, quotes and other letters in a name", Expected(seen, (0,), "", same_cache(odd, world))
    words = cache_line(str(folder / "plain"))[1:]
    seen = play_process(words, HOME="", LC_ALL="C", PYTHONUTF8="")
    yield "51 no HOME, locale C", Expected(seen, (0,), "", same_cache(folder / "plain", world))
    dashed = train_line(world.at("cache"), "./-x")
    seen = play(dashed, before=lambda: os.chdir(folder))
    yield "15 a folder ./-x", Expected(seen, (0,), "", (folder / "-x" / "model.safetensors").is_file())
    yield "15 a name that is no UTF-8", refused(cache_line(str(folder / "\udcff")), "is not UTF-8 text")
    data = folder / "data"
    data.mkdir()
    (data / "a.jsonl").write_text('{"text": "Return the name."}\n')
    os.mkfifo(data / "b.jsonl")
    yield "15 a pipe in a data folder", refused(cache_line(str(folder / "c"), data=data, n_tokens=4), "is a pipe")
    moved = Path(edited(ASSETS / "base", folder, "config.json", lambda value: value | {"use_cache": False}))
    yield "10 the model is another one on resume", refused(cache_line(world.at("begun"), base=moved), "another base")
    changed = train_line(world.at("cache"), world.at("run"), lr=2e-3)
    yield "27 another rate on resume", refused(changed, "holds a run with lr = 0.001, now 0.002")


def models(world: World, folder: Path) -> Named:
    """Play a model with a weight that is not a number, templates that loop, and documents that are cut."""
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(ASSETS / "base", folder / "nan"))
    weights = {name: value.clone() for name, value in load_file(model / "model.safetensors").items()}
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    yield (
        "12 activations that are not finite",
        refused(cache_line(str(folder / "c"), base=model), "non-finite .* NaN in its weights"),
    )
    line = fit_line(world.at("run"), str(folder / "f"), model=model, foreign_dictionary="true")
    yield "15 NaN weights in sae-lora fit", refused(line, "not finite")
    loop = folder / "loop.jinja"
    loop.write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    line = cache_line(str(folder / "l"), data=json.dumps(DATA[1:]), chat_template=loop)
    yield "15 a template that loops", refused(line, "the chat template has not ended after 30 s")
    seen = play(cache_line(str(folder / "cut"), context_length=16, data=json.dumps(DATA[:1])))
    yield "17 documents longer than the context", Expected(seen, (0,), r"[\d,]+ tokens beyond context_length")
    seen = play(cache_line(str(folder / "left"), max_norm_multiple=1.1))
    yield "14 tokens of large norm", Expected(seen, (0,), "of outlying norm left out")


GROUPS: tuple[Callable[[World, Path], Named], ...] = (kills, scales, signals, limits, names, models)
