"""Directions of a TopKLoRA, latents of a shared SAE and pieces of a decomposition, against slow routes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import Pair, make_model, make_tokenizer
from explorer_runs import run_of_every_kind, slow_answer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from crosscoders import InputError
from crosscoders.common.files import write_json
from crosscoders.text.tokens import tokenize_prompt
from diffing import Session
from diffing.explorer.answers import Change
from diffing.explorer.kinds import halves
from diffing.explorer.opening import found
from diffing.explorer.views import run_view, table_view

PROMPT = "What does it do?"
N_NEW = 6


@pytest.fixture(scope="module")
def run(cache_folder: Path, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of_every_kind(tmp_path_factory.mktemp("kinds") / "run", cache_folder, pair)


@pytest.fixture(scope="module")
def session(run: Path, cache_folder: Path) -> Session:
    return Session(run, cache_folder)


@pytest.fixture
def base(pair: Pair) -> Any:
    return AutoModelForCausalLM.from_pretrained(pair.base)


@pytest.fixture
def tuned(pair: Pair) -> Any:
    return AutoModelForCausalLM.from_pretrained(pair.tuned)


def ids_of(session: Session) -> list[int]:
    return tokenize_prompt(session.info.tokenizer, PROMPT)


def said(session: Session, show: str, **changes: Any) -> str:
    return "".join(session.answer(PROMPT, show=show, max_new_tokens=N_NEW, **changes))


def greedy(session: Session, model: Any) -> str:
    ids = ids_of(session)
    for _ in range(N_NEW):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return decoded(session, ids[-N_NEW:])


def logits_of(session: Session, model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids_of(session)]), use_cache=False).logits
    return logits


def changed_logits(session: Session, show: str, name: str, change: Change) -> Tensor:
    answering = session.kind(show).answering(
        change, name, np.ones(len(ids_of(session)), dtype=bool), is_amplified=False
    )
    with answering.during():
        return logits_of(session, answering.models[-1])


def decoded(session: Session, ids: list[int]) -> str:
    ends = [place for place, token in enumerate(ids) if token == session.info.tokenizer.eos_token_id]
    return str(session.info.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True))


def test_a_run_opens_with_everything_inside_it_the_crosscoder_first(run: Path) -> None:
    assert list(found(run)) == ["crosscoder", "pieces", "sae", "topk-lora"]
    assert [list(found(run / name)) for name in ("pieces", "sae", "topk-lora")] == [
        ["decompose"],
        ["sae"],
        ["topk-lora"],
    ]


@pytest.mark.parametrize("show", ["pieces", "sae", "topk-lora"])
def test_each_kind_opens_alone_and_reads_as_it_does_inside(session: Session, run: Path, show: str) -> None:
    assert Session(run / show).latents(PROMPT) == session.latents(PROMPT, show=show)


def test_the_page_of_a_run_without_a_crosscoder_says_what_it_holds(run: Path) -> None:
    alone = Session(run / "topk-lora")
    listed, n = table_view(alone, None), alone.kind().n
    assert listed["headline"] == f"tuned against base: {n} directions" and len(listed["number"]) == n
    assert run_view(alone)["kinds"] == [{"name": "topk-lora", "title": "directions of the TopKLoRA"}]


def test_the_line_at_the_top_is_about_what_is_shown(session: Session) -> None:
    n = session.kind("pieces").n
    assert table_view(session, "pieces")["headline"] == f"tuned against base: {n} pieces"
    assert "crosscoder" in table_view(session, "crosscoder")["headline"]


@pytest.mark.parametrize("show", ["crosscoder", "pieces", "sae", "topk-lora"])
def test_list_and_pages_are_plain_data_and_name_what_fires(session: Session, show: str) -> None:
    kind = session.kind(show)
    listing = kind.listing()
    assert sorted(listing.number) == list(range(kind.n))
    assert {len(column) for column in [*listing[:-1], *listing.values.values()]} == {kind.n}
    readings = session.latents(PROMPT, show=show)
    assert sum(len(reading.latents) for reading in readings) > 0
    assert {len(lengths) for reading in readings for lengths in reading.lengths} == {len(kind.form.bars)}
    page = session.latent(readings[-1].latents[0], show=show)
    assert json.loads(json.dumps([page, listing], allow_nan=False))[0] == page


def outputs(model: Any, module: str, ids: list[int]) -> Tensor:
    """What a module reads in one pass."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0]


def with_deltas(model: Any, run: Path, steer: tuple[str, int, float] | None = None) -> Any:
    """A base whose linear maps add the adapter's k largest directions; steer: site, direction, activation added."""
    weights = load_file(run / "topk-lora/adapter/topk_lora.safetensors")
    for site in {name.rsplit(".", 1)[0] for name in weights}:
        A, W_out = weights[f"{site}.A"], weights[f"{site}.W_out"]
        module, is_table = model.get_submodule(site), site.endswith("embed_tokens")

        def chosen(z: Tensor) -> Tensor:
            top = z.relu().topk(2, dim=-1)
            return torch.zeros_like(z).scatter_(-1, top.indices, top.values)

        def add(_m: Any, args: Any, out: Tensor, A: Tensor = A, W: Tensor = W_out, is_table: bool = is_table,
                site: str = site) -> Tensor:  # fmt: skip
            a = chosen(A.T[args[0]] if is_table else args[0] @ A.T)
            if steer is not None and steer[0] == site:
                a = a + steer[2] * torch.eye(len(A))[steer[1]]
            return out + 2.0 * a @ W * (16**0.5 if is_table else 1.0)  # alpha = 2 rank; Gemma scales its embedding

        module.register_forward_hook(add)
        if is_table:  # the head is tied to it
            change = chosen(A.T) @ W_out
            head = model.get_output_embeddings()
            head.register_forward_hook(lambda _m, args, out, change=change: out + 2.0 * args[0] @ change.T)
    return model


def test_directions_of_a_token_are_the_largest_of_each_site_in_the_adapted_base(
    session: Session, run: Path, base: Any
) -> None:
    site, ids = "model.layers.1.mlp.down_proj", ids_of(session)
    weights = load_file(run / "topk-lora/adapter/topk_lora.safetensors")
    z = (outputs(with_deltas(base, run), site, ids) @ weights[f"{site}.A"].T).relu()
    table = pandas.read_parquet(run / "topk-lora/directions.parquet")
    rows = {(entry.site, entry.direction): row for row, entry in enumerate(table.itertuples())}
    for reading, values in zip(session.latents(PROMPT, show="topk-lora"), z, strict=True):
        fired = dict(zip(reading.latents, reading.activations, strict=True))
        own = {j: fired[rows[site, j]] for j in range(6) if rows[site, j] in fired}
        top = values.topk(2)
        expected = {j: v for j, v in zip(top.indices.tolist(), top.values.tolist(), strict=True) if v > 0}
        assert own == pytest.approx(expected, rel=1e-4)


def test_the_adapted_base_answers_with_its_directions_and_the_base_without(
    session: Session, run: Path, base: Any, pair: Pair
) -> None:
    every = list(range(session.kind("topk-lora").n))
    plain = greedy(session, base)
    adapted = greedy(session, with_deltas(base, run))
    assert said(session, "topk-lora") == adapted != plain
    assert said(session, "topk-lora", ablate=every) == said(session, "topk-lora", model="base") == plain
    assert said(session, "crosscoder", model="base") == plain


def test_a_steered_direction_is_added_at_every_position(session: Session, run: Path, base: Any) -> None:
    table = pandas.read_parquet(run / "topk-lora/directions.parquet")
    row = int(table.index[table["site"] == "model.layers.2.mlp.down_proj"][0])
    entry = table.iloc[row]
    steer = (str(entry["site"]), int(entry["direction"]), 5 * float(entry["mean_activation"]))
    expected = logits_of(session, with_deltas(base, run, steer))
    steered = changed_logits(session, "topk-lora", "adapted", Change(steer={row: 5.0}))
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed_logits(session, "topk-lora", "adapted", Change()), expected, atol=1e-3)


@pytest.fixture(scope="module")
def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run.parent / "some-sae/sae_weights.safetensors")


def encode(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    pre = x @ weights["W_enc"] + weights["b_enc"]
    return pre.relu() * (pre > weights["threshold"])


def test_latents_of_an_sae_have_an_activation_in_each_model(
    session: Session, weights: dict[str, Tensor], base: Any, tuned: Any
) -> None:
    ids = torch.tensor([ids_of(session)])
    with torch.no_grad():
        x = [model(ids, output_hidden_states=True).hidden_states[2][0] for model in (base, tuned)]
    f = torch.stack([encode(weights, of) for of in x], dim=2)
    norms = weights["W_dec"].norm(dim=1)
    readings = session.latents(PROMPT, show="sae")
    assert not readings[0].is_scored
    for reading, values in zip(readings[1:], f[1:], strict=True):
        assert sorted(reading.latents) == values.amax(dim=1).nonzero()[:, 0].tolist()
        for j, lengths in zip(reading.latents, reading.lengths, strict=True):
            expected = [float(v * norms[j]) for v in (*values[j], (values[j, 1] - values[j, 0]).abs())]
            assert lengths == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("ablated, exchanged", [(list(range(24)), []), ([], list(range(24))), ([2, 5], [0, 7, 9])])
def test_changed_latents_of_an_sae_follow_their_definition(
    session: Session, weights: dict[str, Tensor], side: int, ablated: list[int], exchanged: list[int]
) -> None:
    def edit(x: Tensor) -> Tensor:
        own, other = encode(weights, x[:, side]), encode(weights, x[:, 1 - side])
        change = -own[:, ablated] @ weights["W_dec"][ablated]
        change = change + (other - own)[:, exchanged] @ weights["W_dec"][exchanged]
        change[0] = 0.0  # the beginning of sequence is not scored
        return x[:, side] + change

    ids = slow_answer(session.pair.models, side, ids_of(session), N_NEW, edit)
    changed = said(session, "sae", model=("base", "tuned")[side], ablate=ablated, exchange=exchanged)
    assert changed == decoded(session, ids)


def test_a_piece_that_is_switched_off_is_taken_out_of_the_weights(session: Session, run: Path, tuned: Any) -> None:
    table = pandas.read_parquet(run / "pieces/pieces.parquet")
    tensors = load_file(run / "pieces/decomposition.safetensors")
    for entry in table.itertuples():
        V, U = (tensors[f"site/{entry.site}/{part}"] for part in "VU")
        tuned.get_submodule(str(entry.site)).weight.data -= torch.outer(U[entry.piece], V[:, entry.piece])
    changed = changed_logits(session, "pieces", "tuned", Change(ablate=tuple(range(len(table)))))
    torch.testing.assert_close(changed, logits_of(session, tuned), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed_logits(session, "pieces", "tuned", Change()), changed, rtol=1e-4, atol=1e-5)


def test_pieces_are_needed_as_the_decomposition_says(session: Session) -> None:
    readings = session.latents(PROMPT, show="pieces")
    assert readings[0].is_scored  # the beginning of sequence too
    assert all(0.1 < g <= 1 for reading in readings for g in reading.activations)


@pytest.mark.parametrize(
    "show, changes, message",
    [
        ("pieces", {"steer": {0: 1.0}}, "steer is not for a piece; there is ablate"),
        ("pieces", {"ablate": [0], "model": "base"}, "pieces are of the tuned model"),
        ("topk-lora", {"exchange": [0]}, "exchange is not for a direction; there is steer, ablate"),
        ("topk-lora", {"ablate": [0], "model": "tuned"}, "directions are changed in the adapted base"),
        ("topk-lora", {"amplify": 1.0}, "the adapted base has no other model"),
        ("sae", {"model": "adapted"}, "model is 'adapted'; give one of base, tuned"),
        ("sae", {"ablate": [24]}, "there is no latent 24: there are latents 0 to 23"),
        ("nothing", {}, "show is 'nothing'; the run has crosscoder, pieces, sae, topk-lora"),
    ],
)
def test_what_a_kind_cannot_do_is_one_line(session: Session, show: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        session.answer(PROMPT, show=show, **changes)


def test_what_is_of_other_models_is_refused_and_the_rest_opens(
    run: Path, cache_folder: Path, pair: Pair, tmp_path: Path
) -> None:
    inside = tmp_path / "run"
    inside.mkdir()
    for path in run.iterdir():
        (inside / path.name).symlink_to(path)
    (inside / "topk-lora").unlink()
    (inside / "topk-lora").mkdir()
    other = tmp_path / "other"
    make_tokenizer(other, template=False)
    make_model(other, seed=3)
    record = json.loads((run / "topk-lora/topk-run.json").read_text())
    del record["content_checksum"]
    record["config"]["tuned"] = str(other)
    write_json(inside / "topk-lora/topk-run.json", record)
    opened = Session(inside, cache_folder)
    with pytest.raises(InputError, match=r"topk-lora is of '.*other', and the models in memory are '.*tuned'"):
        opened.latents(PROMPT, show="topk-lora")
    assert opened.latents(PROMPT)


@pytest.mark.parametrize(
    "context, parts",
    [
        ("<bos>>>En<<ding case:", ["<bos>", "En", "ding case:"]),
        ("a .>><end_of_turn><<↵x", ["a .", "<end_of_turn>", "↵x"]),
        (" line>>.<<<end_of_turn>", [" line", ".", "<end_of_turn>"]),
        ("no token", ["no token", "", ""]),
    ],
)
def test_a_stored_context_is_taken_apart_at_its_token(context: str, parts: list[str]) -> None:
    assert halves(context) == parts
