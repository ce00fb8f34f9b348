"""Changes planted in attention maps are read back: their trigger, and the head that looks elsewhere."""

import copy
from typing import Any

import pytest
import torch

from crosscoders.text.settings import DataSource
from diffing.decomposition.attention import read_attention
from diffing.decomposition.build import fresh
from diffing.decomposition.evaluation import explained
from diffing.decomposition.language import LanguageTask, deltas_of
from diffing.decomposition.model import Decomposition
from diffing.decomposition.readouts import read_importances, read_pieces
from diffing.decomposition.settings import DecomposeSettings, DecompositionConfig
from diffing.demo import document_file, model_folder
from diffing.topk_lora.distil import Setting, open_setting

QUERY, VALUE, WORD = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", " the"
CONFIG = DecompositionConfig(components=3, network="scalar", hidden=8)


@pytest.fixture(scope="module")
def opened() -> Setting:
    return open_setting(
        DecomposeSettings(
            base=str(model_folder("base")), tuned=str(model_folder("tuned")), out="unused", n_tokens=2_000,
            data=[DataSource(path=str(document_file("raw_train")))], context_length=32, device="cpu",
        )
    )  # fmt: skip


def trigger(setting: Setting) -> torch.Tensor:
    """Return v with v . x = 1 for WORD and little for others: the first layer reads a function of the token alone."""
    (token,) = setting.tokenizer.encode(WORD, add_special_tokens=False)
    core = setting.base.model
    with torch.no_grad():
        x = core.layers[0].input_layernorm(core.embed_tokens(torch.arange(core.config.vocab_size))).float()
    direction = torch.linalg.solve(x.T @ x / len(x) + 1e-3 * torch.eye(x.shape[1]), x[token])
    v: torch.Tensor = direction / (direction @ x[token])
    return v


def planted(setting: Setting, site: str, write: torch.Tensor) -> Any:
    """Return the base with one piece added to a map."""
    model = copy.deepcopy(setting.base)
    with torch.no_grad():
        model.get_submodule(site).weight += torch.outer(write, trigger(setting))
    return model


def by_hand(setting: Setting, site: str, write: torch.Tensor, *, threshold: float) -> Decomposition:
    """Return a decomposition whose first piece is the planted one, important where v . x is above a threshold, and
    whose others are nothing."""
    tuned = planted(setting, site, write)
    made = fresh(tuned, deltas_of(setting.base, tuned, [site]), CONFIG, is_relative=True)
    V, U = torch.zeros(128, 3), torch.zeros(3, len(write))
    V[:, 0], U[0] = trigger(setting), write
    made.sites[site].set_pieces(V, U)
    network = made.networks[0]
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
        network.w1[0, 0], network.b1[0, 0], network.w2[0, 0] = 8, -8 * threshold, 1
    return made


def of_head_one() -> torch.Tensor:
    write = torch.zeros(128)
    write[32:64] = 12 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    return write


def test_the_read_out_of_a_piece_of_a_value_map_names_the_planted_trigger(opened: Setting) -> None:
    write = 6 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    made = by_hand(opened, VALUE, write, threshold=0.5)
    setting = opened._replace(tuned=made.model)
    measured = explained(made, LanguageTask(), setting.held_out)
    assert measured.alive() == {VALUE: [0]}
    table = read_pieces(setting, made, measured, read_importances(setting, made, measured.alive()))
    assert table["tokens"][0].startswith(repr(WORD))
    assert f">>{WORD}<<" in table["context"][0]


def test_a_piece_of_the_queries_moves_the_head_that_it_writes_to_and_no_other_of_its_layer(opened: Setting) -> None:
    made = by_hand(opened, QUERY, of_head_one(), threshold=0.5)
    implementation = made.model.config._attn_implementation
    heads = read_attention(made, opened.tokenizer, (QUERY, 0), opened.held_out, top=16)
    moved = {head.head: head.moved for head in heads if head.layer == 0}
    assert moved[1] > 0.01 and max(moved[head] for head in (0, 2, 3)) < 1e-6
    assert made.model.config._attn_implementation == implementation


def test_a_piece_that_is_needed_nowhere_moves_no_head(opened: Setting) -> None:
    made = by_hand(opened, QUERY, of_head_one(), threshold=1e3)
    assert read_attention(made, opened.tokenizer, (QUERY, 0), opened.held_out) == []
