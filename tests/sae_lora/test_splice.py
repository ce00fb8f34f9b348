"""Splicing: what runs in place of an activation, at which positions, and that it ran."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Pair, make_tokenizer
from generation import stepwise_and_whole
from splices import BOS, EOS, IDS, KEPT, MASK, PAD, POINT, Shift
from torch import Tensor, nn

from crosscoders import InputError
from crosscoders.models import hooks
from sae_lora.dictionaries.frozen import Constant
from sae_lora.fitting.inputs import make_plan
from sae_lora.fitting.settings import TextConfig
from sae_lora.splicing import FIRST_POSITION, kept_positions, special_ids, splice


@pytest.fixture(scope="module")
def model(pair) -> Iterator[nn.Module]:  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    yield AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32).eval().requires_grad_(False)


def after(model: nn.Module, point: str = POINT) -> Tensor:
    """The activation that the layers above read."""
    with hooks.capture(model, [point]) as seen:
        model(input_ids=IDS, attention_mask=MASK)
    return seen[point]


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_replace_changes_every_position_but_bos_eos_and_padding(model: nn.Module) -> None:
    x = after(model)
    with splice(model, Shift(2.0, 1.0), keep_ids=[BOS, EOS]) as spliced:
        found = after(model)
    assert torch.equal(found[KEPT], x[KEPT])
    assert torch.equal(found[~KEPT], 2 * x[~KEPT] + 1)
    assert spliced.fired == {POINT: 1} and n_hooks(model) == 0


def test_error_mode_keeps_the_numbers_and_takes_the_gradient_of_the_reconstruction(model: nn.Module) -> None:
    x = after(model)
    with splice(model, Shift(3.0, 1.0), mode="error"):
        torch.testing.assert_close(after(model), x)
    probe = torch.ones(1, requires_grad=True)
    with (
        hooks.replace(model, POINT, lambda x: x * probe),
        splice(model, Shift(3.0, 1.0), mode="error", keep_ids=[BOS, EOS]),
    ):
        after(model).sum().backward()
    torch.testing.assert_close(probe.grad, x[KEPT].sum()[None] + 3 * x[~KEPT].sum()[None])
    with splice(model, Shift(3.0, 1.0), mode="off") as spliced:
        assert torch.equal(after(model), x)
    assert spliced.fired == {POINT: 1}


def test_dictionaries_of_another_type_get_and_give_back_theirs(model: nn.Module) -> None:
    x = after(model)
    with splice(model, Shift(1.0, 0.0, dtype=torch.float64)):
        assert torch.equal(after(model), x)
    assert after(model).dtype == torch.float32


def test_several_points_and_nested_splices_compose_in_order(model: nn.Module) -> None:
    first, second = "blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"
    with splice(model, [Shift(0.0, 1.0, first), Shift(0.0, 2.0, second)]) as spliced:
        model(input_ids=IDS)
    assert spliced.fired == {first: 1, second: 1}
    x = after(model)
    with splice(model, Shift(2.0, 0.0)), splice(model, Shift(1.0, 1.0)):
        assert torch.equal(after(model)[~KEPT], 2 * x[~KEPT] + 1)
    for _ in range(2):
        with splice(model, Constant(POINT, torch.zeros(16))):
            assert not after(model)[~KEPT].any()
    assert n_hooks(model) == 0


def test_tuple_layers_keep_their_other_outputs() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x + 1, "state"

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer()])

        def forward(self, input_ids: Tensor) -> tuple[Tensor, str]:
            out: tuple[Tensor, str] = self.layers[0](input_ids[..., None].expand(-1, -1, 16).float())
            return out

    tiny = Tiny()
    with splice(tiny, Constant("blocks.0.hook_resid_post", torch.zeros(16)), keep_ids=[BOS]):
        out, state = tiny(IDS)
    assert state == "state" and torch.equal(out[:, 1:], torch.zeros(2, 4, 16)) and (out[:, 0] == BOS + 1).all()


def test_generation_with_a_cache_equals_generation_without(model: nn.Module) -> None:
    ids, mask = IDS.flip(1)[1:], MASK.flip(1)[1:]
    plain, _ = stepwise_and_whole(model, ids, mask, 1)
    with splice(model, Shift(0.5, 0.3), keep_ids=[BOS, EOS]):
        cached, whole = stepwise_and_whole(model, ids, mask, 6)
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)  # sums in another order
    assert cached.shape[:2] == (1, 6) and float((cached[:, 0] - plain[:, 0]).abs().max()) > 1e-3


def test_a_splice_works_under_peft_and_in_a_transformer_bridge(pair) -> None:  # type: ignore[no-untyped-def]
    import peft
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32).eval()
    with splice(plain, Shift(0.5, 0.3), keep_ids=[BOS, EOS]):
        wanted = plain(input_ids=IDS, attention_mask=MASK).logits
    assert (wanted - plain(input_ids=IDS, attention_mask=MASK).logits).abs().max() > 1e-3
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with splice(adapted, Shift(0.5, 0.3), keep_ids=[BOS, EOS]) as spliced:
        assert torch.equal(adapted(input_ids=IDS, attention_mask=MASK).logits, wanted)
    assert spliced.fired[POINT] == 1
    whole = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32).eval()
    bridge = TransformerBridge.boot_transformers(pair.base, hf_model=whole, device="cpu", dtype=torch.float32)
    with splice(bridge, Shift(0.5, 0.3), keep_ids=[BOS, EOS]):
        found = bridge(IDS, attention_mask=MASK, return_type="logits")
    torch.testing.assert_close(found[MASK.bool()], wanted[MASK.bool()], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_spliced_is_said(model: nn.Module) -> None:
    with pytest.raises(InputError, match="needs a TransformerBridge"), splice(model, Shift(1, 0, "blocks.1.hook_q")):
        pass
    with pytest.raises(InputError, match="layers 0 to 2"), splice(model, Shift(1, 0, "blocks.7.hook_resid_post")):
        pass
    with pytest.raises(InputError, match="one dictionary for each"), splice(model, [Shift(1, 0), Shift(1, 0)]):
        pass
    with pytest.raises(InputError, match="never fired"), splice(model, Shift(1, 0)):
        pass
    with pytest.raises(InputError, match="d_model 15"), splice(model, Constant(POINT, torch.zeros(15))):
        model(input_ids=IDS)
    with pytest.raises(InputError, match="needs the token ids"), splice(model, Shift(1, 0)):
        model(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(InputError, match="outside a forward pass"), splice(model, Shift(1, 0)):
        model.model(input_ids=IDS)  # type: ignore[operator]
    with pytest.raises(ZeroDivisionError), splice(model, Shift(1, 0)):
        raise ZeroDivisionError
    assert n_hooks(model) == 0


def test_the_first_position_is_kept_where_there_is_no_bos(model: nn.Module) -> None:
    keep_ids = special_ids(SimpleNamespace(bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD))
    assert keep_ids == [FIRST_POSITION, PAD, EOS]
    x = after(model)
    with splice(model, Shift(2.0, 1.0), keep_ids=keep_ids):
        found = after(model)
    assert torch.equal(found[KEPT], x[KEPT]) and torch.equal(found[~KEPT], 2 * x[~KEPT] + 1)
    with splice(model, Shift(2.0, 1.0), keep_ids=[EOS]):
        assert torch.equal(after(model)[:, 0], 2 * x[:, 0] + 1)
    assert special_ids(SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None)) == [EOS, BOS]


def test_the_first_position_is_found_behind_left_padding_and_in_a_longer_mask() -> None:
    ids, mask = torch.tensor([[PAD, PAD, 7, 8], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    wanted = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(kept_positions(ids, mask, [FIRST_POSITION]), wanted)
    later = kept_positions(ids[:, -1:], torch.ones(2, 9, dtype=torch.int64), [FIRST_POSITION])
    assert not later.any()  # with a key-value cache the ids are not the first ones


def test_generation_without_bos_is_the_same_with_a_key_value_cache(model: nn.Module) -> None:
    found = []
    for use_cache in (True, False):
        with splice(model, Shift(0.5, 0.3), keep_ids=[FIRST_POSITION, EOS]):
            found.append(
                model.generate(  # type: ignore[operator]
                    torch.tensor([[7, 8, 9]]), attention_mask=torch.ones(1, 3, dtype=torch.int64), max_new_tokens=6,
                    min_new_tokens=6, do_sample=False, use_cache=use_cache,
                )
            )  # fmt: skip
    assert torch.equal(found[0], found[1])


def test_a_fit_on_a_tokenizer_without_bos_keeps_the_first_position_and_does_not_score_it(
    pair: Pair, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path / "tokenizer", bos=False)
    text = TextConfig(data=pair.data, n_tokens=200, context_length=16, tokenizer=str(tmp_path / "tokenizer"))
    plan = make_plan(text, pair.base, [])
    assert plan.keep_ids == [FIRST_POSITION, PAD, EOS]
    for batch in plan.batches(4, torch.device("cpu")):
        assert not batch.scored[:, 0].any() and torch.equal(batch.scored[:, 1:], batch.attention_mask[:, 1:].bool())
