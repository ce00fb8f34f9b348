"""The amplified distribution against a slow route, its two ends, and what stops a sample."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair
from torch import Tensor

from crosscoders.models.names import quiet_transformers
from crosscoders.models.pair import ModelPair, load_pair
from diffing.samples.amplified import GREEDY, amplify, decode, decode_steps, draw

PROMPTS = [[2, 40], [2, 41, 42, 43, 44], [2, 60, 61]]
N_TOKENS = 6


@pytest.fixture(scope="module")
def models(pair: Pair) -> ModelPair:
    return load_pair(pair.base, pair.tuned, "blocks.0.hook_resid_post", whole=True)


def drawn(models: tuple[Any, Any], **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {
        "strength": 2.0, "cut": 0.05, "max_new_tokens": N_TOKENS, "ends": set(), "n_ids": 320, "batch_rows": 2,
        "seed": 3,
    }  # fmt: skip
    return [sample.ids for sample in decode(*models, PROMPTS, **(settings | changes))]


def slow(base: Any, tuned: Any, strength: float, cut: float, uniforms: Tensor) -> list[list[int]]:
    """One text at a time, one whole pass for each token, no keys and values kept, probabilities by powers."""
    lines = []
    for prompt, numbers in zip(PROMPTS, uniforms, strict=True):
        ids = list(prompt)
        for number in numbers:
            with torch.no_grad():
                p, q = (m(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1) for m in (base, tuned))
            weights = torch.where(q < cut * q.max(), 0.0, q * (q / p) ** strength).double()
            ids.append(int(((weights / weights.sum()).cumsum(0) <= number).sum()))
        lines.append(ids[len(prompt) :])
    return lines


def gemma3(seed: int) -> Any:
    """A window that the prompts outgrow, every second layer whole, norms of queries and keys, heads wider than the
    stream."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], initializer_range=0.3,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def test_a_window_shorter_than_the_text_does_not_change_what_is_drawn() -> None:
    models = gemma3(0), gemma3(1)
    uniforms = torch.from_numpy(np.random.default_rng(3).random((3, N_TOKENS)))
    assert drawn(models) == slow(*models, 2.0, 0.05, uniforms)


@pytest.mark.parametrize("strength, cut", [(0.0, 0.0), (2.0, 0.05), (40.0, 0.3)])
def test_batches_with_kept_keys_draw_what_whole_passes_draw(models: ModelPair, strength: float, cut: float) -> None:
    uniforms = torch.from_numpy(np.random.default_rng(3).random((3, N_TOKENS)))
    assert drawn(models.models, strength=strength, cut=cut) == slow(*models.models, strength, cut, uniforms)


def test_a_bridge_which_keeps_no_keys_decodes_the_same_steps(pair: Pair, models: ModelPair) -> None:
    bridges = load_pair(pair.base, pair.tuned, "blocks.1.hook_mlp_out", whole=True).models
    taken: list[list[list[int]]] = []
    for chosen in (models.models, bridges):
        with quiet_transformers():
            steps = decode_steps(chosen, PROMPTS, strength=2.0, cut=0.05, n_ids=320)
            taken.append([next(steps).tokens for _ in range(N_TOKENS)])
    assert taken[0] == taken[1]


def test_strength_0_is_the_tuned_model_and_minus_1_the_base() -> None:
    base, tuned = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    torch.testing.assert_close(amplify(base, tuned, strength=0, cut=0), tuned)
    torch.testing.assert_close(amplify(base, tuned, strength=-1, cut=0), base)


def test_tokens_below_a_share_of_the_largest_probability_are_cut() -> None:
    # tuned .5 .3 .2, base .25 .25 .5, a = 1: weights 1, .36, .08; at a cut of .5 (.25) the last one goes
    base, tuned = torch.tensor([[0.25, 0.25, 0.5]]).log(), torch.tensor([[0.5, 0.3, 0.2]]).log()
    mixed = amplify(base, tuned, strength=1, cut=0.5).exp()
    torch.testing.assert_close(mixed, torch.tensor([[1 / 1.36, 0.36 / 1.36, 0.0]]))


def test_a_token_of_probability_0_is_never_drawn() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).repeat(3, 1)
    assert draw(probabilities, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == [1, 3, 3]


def test_a_sample_does_not_depend_on_its_batch_and_another_seed_gives_others(models: ModelPair) -> None:
    assert drawn(models.models, batch_rows=1) == drawn(models.models, batch_rows=3)
    assert drawn(models.models) != drawn(models.models, seed=4)


def test_a_sample_ends_before_the_first_end_token(models: ModelPair) -> None:
    whole = drawn(models.models)
    ended = drawn(models.models, ends={whole[0][2]})
    assert ended[0] == whole[0][: whole[0].index(whole[0][2])]


def test_the_largest_cut_is_greedy(models: ModelPair) -> None:
    tuned: Any = models.models[1]
    out = tuned.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS, do_sample=False)
    assert drawn((tuned, tuned), strength=0, cut=GREEDY)[1] == out[0, len(PROMPTS[1]) :].tolist()
