"""The training loop: order of data, one seed one result on every stream, faults."""

import itertools
import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Pair
from training_runs import activations, config, run, weights

from crosscoders import (
    ActivationCache,
    CorruptData,
    CrosscoderConfig,
    InputError,
    cached_stream,
    evaluate,
    live_stream,
    load_crosscoder,
    load_pair,
    tensor_stream,
    train,
)
from crosscoders.activations.scored import moments_of
from crosscoders.activations.source import ActivationSource
from crosscoders.activations.stream import BufferedStream
from crosscoders.common import files
from crosscoders.text.tokens import tokenize_documents
from crosscoders.training.start import geometric_median


def test_an_epoch_covers_every_token_once_except_the_rest_of_a_buffer() -> None:
    x = torch.arange(103.0)[:, None, None].expand(-1, 2, 1)
    stream = tensor_stream(x, batch_size=10, buffer_tokens=40, seed=1)
    assert stream.steps_per_epoch == 10  # buffers of 40, 40 and 23 tokens: the last one leaves 3 over
    batches = stream.batches(0, 20)
    first = torch.cat([next(batches)[:, 0, 0] for _ in range(10)])
    second = torch.cat([next(batches)[:, 0, 0] for _ in range(10)])
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == 100
        assert set(epoch[:40].tolist()) == set(map(float, range(40)))
    assert not torch.equal(first, second)


def test_a_stream_started_at_any_step_gives_the_same_batches() -> None:
    stream = tensor_stream(activations(103), batch_size=10, buffer_tokens=40, seed=1)
    whole = list(stream.batches(0, 20))
    assert len(whole) == 20
    for step in range(20):
        assert torch.equal(torch.stack(list(stream.batches(step, 20))), torch.stack(whole[step:]))
    assert not torch.equal(next(iter(tensor_stream(activations(103), batch_size=10, seed=2).batches(0, 1))), whole[0])


def test_batches_are_those_of_the_written_rule() -> None:
    x, expected = activations(100), list[torch.Tensor]()
    for epoch in range(2):
        for buffer, (start, stop, n_batches) in enumerate([(0, 40, 4), (40, 80, 4), (80, 100, 2)]):
            seed = random.Random(f"7:{epoch}:{buffer}").getrandbits(62)
            order = torch.randperm(stop - start, generator=torch.Generator().manual_seed(seed))
            expected += x[start:stop][order][: n_batches * 10].split(10)
    found = list(tensor_stream(x, batch_size=10, buffer_tokens=40, seed=7).batches(0, 20))
    assert torch.equal(torch.stack(found), torch.stack(expected))


class Buffers:
    """Three buffers of 40 tokens, each in four parts; notes which are being filled, and raises in the one named."""

    def __init__(self, x: torch.Tensor, fails: int | None = None) -> None:
        self.x, self.fails, self.begun, self.second = x, fails, list[int](), threading.Event()
        self.stream = BufferedStream(
            self.read, n_tokens=120, batch_size=10, buffer_tokens=40, seed=0, moments=moments_of(x)
        )

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        self.begun.append(start // 40)
        if self.begun[-1] == 1:
            self.second.set()
        if self.begun[-1] == self.fails:
            raise CorruptData("a shard is damaged")
        yield from self.x[start:stop].split(10)


def test_the_next_buffer_is_filled_while_batches_of_one_are_taken_and_no_other() -> None:
    buffers = Buffers(activations(120))
    batches = buffers.stream.batches(0, 24)
    next(batches)
    assert buffers.second.wait(60) and buffers.begun == [0, 1]
    rest = list(batches)
    assert len(rest) == 23 and buffers.begun == [0, 1, 2, 0, 1, 2]


def test_nothing_is_filled_that_no_step_needs() -> None:
    buffers = Buffers(activations(120))
    assert len(list(buffers.stream.batches(2, 4))) == 2 and buffers.begun == [0]


def test_a_buffer_that_cannot_be_filled_fails_at_its_first_batch() -> None:
    batches = Buffers(activations(120), fails=1).stream.batches(0, 12)
    assert len(list(itertools.islice(batches, 4))) == 4
    with pytest.raises(CorruptData, match="a shard is damaged"):
        next(batches)


def test_leaving_in_the_middle_does_not_wait_for_a_whole_buffer() -> None:
    x, begun = activations(120), threading.Event()

    def read(start: int, stop: int) -> Iterator[torch.Tensor]:
        if start:  # the second buffer is never full
            begun.set()
            while True:
                yield x[:1]
        yield x[start:stop]

    stream = BufferedStream(read, n_tokens=80, batch_size=10, buffer_tokens=40, seed=0, moments=moments_of(x))
    batches = stream.batches(0, 8)
    next(batches)
    assert begun.wait(60)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("buffer")]


def test_a_shard_that_two_buffers_share_is_read_once_in_a_pass(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, names = ActivationCache(cache_folder), list[str]()
    read_tensors = cache.folder.read_tensors

    def counted(name: str, expected: files.Written) -> dict[str, torch.Tensor]:
        names.append(name)
        return read_tensors(name, expected)

    monkeypatch.setattr(cache.folder, "read_tensors", counted)
    shards = [shard["name"] for shard in cache.manifest["shards"]]
    stream = cached_stream(cache, batch_size=8, buffer_tokens=len(cache) // 2 - 3)
    assert len(shards) > 1 and len(stream.spans) >= 2
    list(stream.batches(0, stream.steps_per_epoch))
    assert names == shards


def test_the_first_and_the_last_steps_take_no_reading_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, spans = activations(1280), list[tuple[int, int]]()

    def read(start: int, stop: int) -> list[torch.Tensor]:
        spans.append((start, stop))
        return [x[start:stop]]

    stream = BufferedStream(read, n_tokens=1280, batch_size=32, buffer_tokens=640, seed=0, moments=moments_of(x))
    monkeypatch.setattr("crosscoders.training.loop.MAX_TOKENS", 320)  # of the last steps, which calibrate
    train(config(b_dec_init="geometric_median"), stream, tmp_path)
    assert spans == [(0, 640), (640, 1280)]


def test_too_few_tokens_for_a_batch_are_refused() -> None:
    with pytest.raises(InputError, match="the data has 5 tokens, less than one batch of 10"):
        tensor_stream(activations(5), batch_size=10)


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_one_seed_gives_one_checkpoint_and_another_seed_another(tmp_path: Path, activation: str) -> None:
    shape = CrosscoderConfig(dict_size=12, activation=activation, k=3 if activation == "batchtopk" else None)  # type: ignore[arg-type]
    settings = config(crosscoder=shape, l1_coefficient=0.1 if activation == "relu" else 0.0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, replace(settings, seed=seed))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    states = [(tmp_path / n / "step-00000040" / "state.safetensors").read_bytes() for n in "ab"]
    assert states[0] == states[1]


def test_training_lowers_the_loss_and_writes_what_it_says(tmp_path: Path) -> None:
    model = run(tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert [line["step"] for line in steps] == [10, 20, 30, 40]
    assert steps[-1]["reconstruction"] < 0.8 * steps[0]["reconstruction"]
    assert abs(steps[-1]["loss"] - steps[-1]["reconstruction"] - steps[-1]["auxiliary"]) < 1e-6
    evaluated = json.loads((tmp_path / "a" / "eval.json").read_text())["rows"]
    found = evaluate(model, activations().split(50))
    assert {r["name"]: r["value"] for r in evaluated}["eval.fve.base"] == pytest.approx(found.fve[0], abs=1e-6)
    assert float(model.threshold) > 0
    loaded = load_crosscoder(tmp_path / "a")
    assert torch.equal(loaded.encode(activations()), model.encode(activations()))


def test_the_input_scale_makes_the_mean_norm_sqrt_d(tmp_path: Path) -> None:
    model, x = run(tmp_path / "a"), activations()
    torch.testing.assert_close(
        model.normalise(x).norm(dim=2).mean(dim=0), torch.full((2,), 6**0.5), rtol=1e-4, atol=1e-4
    )


def test_cache_and_live_stream_train_the_same_weights(pair: Pair, cache_folder: Path, tmp_path: Path) -> None:
    cache, settings = ActivationCache(cache_folder), config()
    loaded = load_pair(pair.base, pair.tuned, "blocks.1.hook_resid_post")
    rows = tokenize_documents(pair.config(cache_folder).data_config(), loaded.info.tokenizer)
    source = ActivationSource(loaded, rows, hook_point="blocks.1.hook_resid_post", batch_rows=4, dtype=torch.float32)
    shared = {"batch_size": 32, "buffer_tokens": 256, "seed": 0}
    train(settings, cached_stream(cache, **shared), tmp_path / "cached")
    train(settings, live_stream(source, n_tokens=600, moments=cache.moments, **shared), tmp_path / "live")
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")


def test_two_threads_read_the_models_as_one_does(pair: Pair, cache_folder: Path) -> None:
    loaded = load_pair(pair.base, pair.tuned, "blocks.1.hook_resid_post")
    rows = tokenize_documents(pair.config(cache_folder).data_config(), loaded.info.tokenizer)
    source = ActivationSource(loaded, rows, hook_point="blocks.1.hook_resid_post", batch_rows=4, dtype=torch.float32)

    def read(start: int) -> torch.Tensor:
        return torch.cat([tokens.activations for tokens in source.read(start, 600)])

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(read, [0, 100]))
    whole = read(0)
    assert torch.equal(both[0], whole) and torch.equal(both[1], whole[100:])


def test_the_geometric_median_survives_a_point_on_the_guess_and_ignores_an_outlier() -> None:
    x = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])[:, None]
    torch.testing.assert_close(geometric_median(x), torch.zeros(1, 2))
    outlier = torch.cat([x, torch.tensor([[[1000.0, 0.0]]])])
    assert geometric_median(outlier).norm() < 1 < outlier.mean(dim=0).norm()


def test_a_non_finite_loss_stops_before_the_step_and_names_term_step_and_state(tmp_path: Path) -> None:
    x = activations()
    folder = tmp_path / "a"
    with pytest.raises(CorruptData, match=r"loss term 'reconstruction' is (nan|inf) at step \d+\. .*lower lr"):
        run(folder, x=torch.where(torch.arange(500)[:, None, None] == 450, torch.tensor(torch.inf), x))
    states = list(folder.glob("step-*"))
    for state in states:
        assert all(torch.isfinite(t).all() for t in files.read_tensors(state / "state.safetensors").values())


def test_a_stream_of_another_width_is_refused(tmp_path: Path) -> None:
    settings = config(crosscoder=CrosscoderConfig(dict_size=12, k=3, d_model=7))
    with pytest.raises(InputError, match="the activations have d_model = 6 but the crosscoder config has 7"):
        run(tmp_path / "a", settings)
