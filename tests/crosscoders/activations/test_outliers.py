"""First positions without BOS, and tokens of massive norm: what is left out, counted and said."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair, make_model, make_tokenizer

from crosscoders import ActivationCache, CacheConfig, CrosscoderConfig, InputError, TrainConfig, cache_activations
from crosscoders import cli as crosscoders_cli
from crosscoders.activations.caching import run_cache
from crosscoders.activations.merge import merge_parts
from crosscoders.activations.outliers import outlier_statistics, outlier_sums, outlier_text, within
from crosscoders.activations.scored import Tokens
from crosscoders.activations.settings import Part
from crosscoders.activations.stream import cached_stream
from crosscoders.text.chats import read_chats
from crosscoders.text.positions import scored_positions
from crosscoders.training.loop import train

BOS = 2


@pytest.fixture(scope="module")
def no_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no-bos")
    make_tokenizer(folder, bos=False)
    return folder


@pytest.fixture(scope="module")
def sink_pair(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The shared pair with one token in the middle of documents, " must", whose embedding is 100 times as long."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = Pair(tmp_path_factory.mktemp("sinks"))
    made.data = pair.data
    for name, seed in (("base", 0), ("tuned", 1)):
        folder = made.folder / name
        make_tokenizer(folder, template=name == "tuned")
        make_model(folder, seed=seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            model.get_input_embeddings().weight[sink_id(AutoTokenizer.from_pretrained(folder))] *= 100
        model.save_pretrained(folder)
    return made


def sink_id(tokenizer: Any) -> int:
    (found,) = tokenizer(" must", add_special_tokens=False)["input_ids"]
    return int(found)


def everything(cache: ActivationCache) -> Tokens:
    return cache.read(0, len(cache))


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


# ---------------------------------------------------------------------------------------------------- first positions


@pytest.mark.parametrize(
    ("ids", "bos", "rule", "wanted"),
    [
        ([BOS, 7, 8, 9], BOS, {}, [0, 1, 1, 1]),
        ([7, 8, 9], BOS, {}, [0, 1, 1]),  # a chat whose template writes no BOS
        ([7, 8, 9], None, {}, [0, 1, 1]),
        ([7, 8, 9], None, {"skip_first": 0}, [1, 1, 1]),
        ([BOS, 7, 8, 9], BOS, {"skip_first": 3}, [0, 0, 0, 1]),
        ([BOS, 7, BOS, 9], BOS, {}, [0, 1, 0, 1]),
        ([BOS, 7, 8], BOS, {"drop_bos": False}, [1, 1, 1]),
        ([7], None, {}, [0]),
        ([], None, {}, []),
    ],
)
def test_scored_positions_are_neither_bos_nor_first(
    ids: list[int], bos: int | None, rule: dict[str, Any], wanted: list[int]
) -> None:
    assert scored_positions(np.array(ids, dtype=np.int32), bos, **rule).tolist() == [bool(value) for value in wanted]


def test_a_cache_without_bos_holds_no_first_position_and_says_so(
    pair: Pair, no_bos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_activations(pair.config(tmp_path / "cache", tokenizer=str(no_bos)))
    tokens, counts = everything(cache), cache.manifest["counts"]
    assert int(tokens.positions.min()) == 1
    assert cache.manifest["skip_first"] == 1 and counts["skipped_tokens"] == counts["documents"]
    assert f"{counts['documents']} rows do not begin with a beginning-of-sequence token" in capsys.readouterr().err
    whole = cache_activations(pair.config(tmp_path / "whole", tokenizer=str(no_bos), skip_first=0))
    first = everything(whole).positions == 0
    assert int(first.sum()) == len(everything(whole).document_ids.unique())
    assert whole.manifest["skip_first"] == 0 and whole.manifest["token_hash"] != cache.manifest["token_hash"]
    assert "--skip-first 0" not in capsys.readouterr().err


def test_a_crosscoder_trains_on_a_cache_without_bos(pair: Pair, no_bos: Path, tmp_path: Path) -> None:
    cache = cache_activations(pair.config(tmp_path / "cache", tokenizer=str(no_bos)))
    settings = TrainConfig(
        crosscoder=CrosscoderConfig(dict_size=24, k=4), n_tokens=640, batch_size=64, lr_warmup_steps=2,
        threshold_start_step=5,
    )  # fmt: skip
    found = train(settings, cached_stream(cache, batch_size=64), tmp_path / "run")
    assert torch.isfinite(found.W_dec).all()


def test_a_cache_with_bos_counts_no_skipped_token(cache_folder: Path) -> None:
    manifest = ActivationCache(cache_folder).manifest
    assert manifest["skip_first"] == 0 and manifest["counts"]["skipped_tokens"] == 0


def test_skip_first_leaves_out_as_many_positions_of_every_row(pair: Pair, tmp_path: Path) -> None:
    cache = cache_activations(pair.config(tmp_path / "cache", skip_first=4))
    assert int(everything(cache).positions.min()) == 4 and cache.manifest["skip_first"] == 4
    counts = cache.manifest["counts"]
    assert counts["skipped_tokens"] == 3 * counts["documents"]  # the fourth is BOS


def test_settings_that_leave_nothing_or_do_nothing_are_refused(pair: Pair, no_bos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="skip_first is 8; give a number from 0 to 7"):
        pair.config(tmp_path, context_length=8, skip_first=8)
    with pytest.raises(InputError, match=r"max_norm_multiple is 0\.5; give a number from 1"):
        pair.config(tmp_path, max_norm_multiple=0.5)
    with pytest.raises(InputError, match="drop_bos false has no effect"):
        cache_activations(pair.config(tmp_path / "c", tokenizer=str(no_bos), drop_bos=False))
    settings = pair.config(tmp_path / "c", max_norm_multiple=5)
    values = {key: getattr(settings, key) for key in ("base", "tuned", "hook_point", "data", "max_norm_multiple")}
    (tmp_path / "live.yaml").write_text(json.dumps(values))
    argv = ["train", "--live", str(tmp_path / "live.yaml"), "--out", str(tmp_path / "run"), "--preset", "demo"]
    assert crosscoders_cli.main(argv) == 2


def test_the_first_token_of_a_chat_without_bos_is_not_patched(pair: Pair, no_bos: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    settings: CacheConfig = pair.config(tmp_path, tokenizer=str(no_bos))
    config = settings.data_config() if hasattr(settings, "data_config") else settings
    chats = read_chats(config, AutoTokenizer.from_pretrained(no_bos), 5)
    assert all(not chat.scored[0] and chat.scored[1:].all() for chat in chats)


# ------------------------------------------------------------------------------------------------------ massive norms


def planted(n: int = 3600) -> torch.Tensor:
    """Activations (n, 2, 8); one token in 36 is a hundred times as long, in the second model only."""
    x = torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    x[::36, 1] *= 100
    return x


def test_shares_of_variance_equal_those_computed_by_hand() -> None:
    x = planted()
    shards = [
        {"n_tokens": len(part), **outlier_sums(part, part.norm(dim=-1), part.mean(dim=0))}
        for part in (x[:2000], x[2000:])
    ]
    found = outlier_statistics(shards)
    is_sink = torch.arange(len(x)) % 36 == 0
    total, sinks, top = 0.0, 0.0, 0.0
    for part, marked in ((x[:2000, 1], is_sink[:2000]), (x[2000:, 1], is_sink[2000:])):
        squares = (part - part.mean(dim=0)).square().sum(dim=1)
        total, sinks = total + float(squares.sum()), sinks + float(squares[marked].sum())
        top += float(squares[part.norm(dim=1).argsort()[-2:]].sum())  # 0.1% of 2,000 and of 1,600, rounded up
    assert found["top_tokens"] == [4, 4] and found["outlying_tokens"] == [0, 100]
    assert found["outlying_share"] == pytest.approx([0, sinks / total]) and found["outlying_share"][1] > 0.99
    assert found["top_share"][1] == pytest.approx(top / total)
    assert found["median_norm"][0] == pytest.approx(float(x[:, 0].norm(dim=1).median()), rel=0.02)


def test_a_high_share_is_a_warning_that_names_what_to_do() -> None:
    x = planted()
    high = outlier_text(outlier_statistics([{"n_tokens": len(x), **outlier_sums(x, x.norm(dim=-1), x.mean(dim=0))}]))
    assert high.startswith("warning: ") and "--skip-first" in high and "--max-norm-multiple 5" in high
    y = x[torch.arange(len(x)) % 36 != 0]
    low = outlier_text(outlier_statistics([{"n_tokens": len(y), **outlier_sums(y, y.norm(dim=-1), y.mean(dim=0))}]))
    assert low.startswith("share of the variance") and "0.0% and 0.0% in 0 tokens" in low


def test_sums_of_an_older_version_give_no_shares() -> None:
    assert outlier_statistics([{"n_tokens": 3, "sum": [0.0]}]) == {} and outlier_text({}) == ""


def test_a_token_is_left_out_where_either_model_is_beyond_the_multiple() -> None:
    x = torch.ones(7, 2, 3)
    x[2, 0], x[5, 1], x[6, 1] = 6.0, 7.0, 4.9  # in units of the medians
    column = torch.arange(7)
    tokens = Tokens(x, *(column.int() for _ in range(3)), column.to(torch.uint8), column.int())
    assert within(tokens, 5).token_ids.tolist() == [0, 1, 3, 4, 6]
    assert within(tokens, None) is tokens and within(tokens, 7) is tokens
    one_each = torch.tensor([[[1.0], [9.0]], [[9.0], [1.0]]])
    both = Tokens(one_each, *(column[:2].int() for _ in range(3)), column[:2].to(torch.uint8), column[:2].int())
    with pytest.raises(InputError, match="leaves no token of a shard"):
        within(both, 2)


def test_a_sink_in_the_middle_of_documents_is_said_and_can_be_left_out(
    sink_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    sink = sink_id(AutoTokenizer.from_pretrained(sink_pair.base))
    argv = ["cache", "--base", sink_pair.base, "--tuned", sink_pair.tuned, "--hook-point", "blocks.1.hook_resid_post"]
    argv += ["--data", sink_pair.data, "--n-tokens", "600", "--shard-tokens", "128", "--dtype", "float32"]
    assert crosscoders_cli.main([*argv, "--out", str(tmp_path / "with")]) == 0
    assert "warning: share of the variance" in capsys.readouterr().err
    whole = ActivationCache(tmp_path / "with")
    n_sinks = int((everything(whole).token_ids == sink).sum())
    assert n_sinks > 5 and whole.manifest["statistics"]["outlying_tokens"] == [n_sinks, n_sinks]
    assert crosscoders_cli.main([*argv, "--out", str(tmp_path / "without"), "--max-norm-multiple", "5"]) == 0
    said = capsys.readouterr().err
    assert "warning: share" not in said and f"({n_sinks} of outlying norm left out)" in said
    rest = ActivationCache(tmp_path / "without")
    wanted = Tokens(*(column[everything(whole).token_ids != sink] for column in everything(whole)))
    assert all(torch.equal(a, b) for a, b in zip(everything(rest), wanted, strict=True))
    assert rest.manifest["statistics"]["left_out_tokens"] == n_sinks and len(rest) == 600 - n_sinks
    assert rest.manifest["max_norm_multiple"] == 5


def test_parts_without_outlying_tokens_merge_to_the_bytes_of_one_run(sink_pair: Pair, tmp_path: Path) -> None:
    config = sink_pair.config(tmp_path / "whole", max_norm_multiple=5)
    whole = cache_activations(config)
    folders = []
    for number in (1, 2):
        folders.append(str(tmp_path / f"part-{number}"))
        run_cache(replace(config, out=folders[-1]), part=Part(number, 2))
    merge_parts(folders, str(tmp_path / "merged"))
    merged = ActivationCache(tmp_path / "merged")
    assert shard_bytes(tmp_path / "merged") == shard_bytes(tmp_path / "whole")
    assert merged.manifest["statistics"] == whole.manifest["statistics"]


def test_a_cache_with_another_multiple_is_another_cache(sink_pair: Pair, tmp_path: Path) -> None:
    cache_activations(sink_pair.config(tmp_path / "cache", max_norm_multiple=5))
    with pytest.raises(InputError, match="another max_norm_multiple"):
        cache_activations(sink_pair.config(tmp_path / "cache"))
