"""Layers that return a tensor or a tuple are read, edited, left out and resumed alike; the head alone in every
architecture."""

import numpy as np
import pytest
import torch
from standins import LanguageModel

from crosscoders.models import hooks, resume
from crosscoders.models.resume import ResumableModel
from crosscoders.text.padding import Batch

POINT = "blocks.1.hook_resid_post"
IDS = torch.tensor([[2, 10, 20, 30, 44], [2, 40, 50, 1, 3]])
MASK = torch.ones_like(IDS)
FORMS = pytest.mark.parametrize("as_tuple", [False, True])


@FORMS
def test_an_activation_is_read_as_a_tensor_from_either_form(as_tuple: bool) -> None:
    model = LanguageModel(as_tuple=as_tuple)
    x = model.model.embed(IDS)
    for layer in model.model.layers[:2]:
        out = layer(x)
        x = out[0] if as_tuple else out
    assert torch.equal(hooks.run_to(model, [POINT], IDS, MASK)[POINT], x)


@FORMS
def test_an_edited_layer_keeps_its_form(as_tuple: bool) -> None:
    model, out = LanguageModel(as_tuple=as_tuple), []
    with hooks.replace(model, POINT, torch.zeros_like):
        handle = model.model.layers[1].register_forward_hook(lambda _m, _a, returned: out.append(returned))
        model(IDS)
        handle.remove()
    changed, *others = out[0] if as_tuple else out
    assert not changed.any() and others == (["state"] if as_tuple else [])


def test_a_forward_pass_that_fails_leaves_no_hook_behind() -> None:
    model = LanguageModel(as_tuple=False)
    no_such_id = torch.tensor([[10**6]])
    with pytest.raises(IndexError):
        resume.find_prefix(model, POINT, Batch(no_such_id, torch.ones_like(no_such_id), None, np.arange(1)))  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in model.modules())


@FORMS
def test_layers_below_are_left_out_in_either_form(as_tuple: bool) -> None:
    model = LanguageModel(as_tuple=as_tuple)
    resumable = ResumableModel(model, POINT)
    assert resumable.prefix
    state = resumable.run(Batch(IDS, MASK, MASK.bool(), np.arange(2)))
    with torch.no_grad(), hooks.replace(model, POINT, lambda x: x * 2):
        expected = model(IDS).logits
    for weight in model.model.layers[:2].parameters():
        weight.data.fill_(float("nan"))  # nothing below the hook point is computed again
    found = resumable.resume(state, state.activation * 2)
    for row in range(2):
        torch.testing.assert_close(resumable.logits(found[row]), expected[row])


def test_a_model_bypassed_in_the_wrong_form_fails() -> None:
    """What the tests above would miss if a stand-in took either form."""
    model = LanguageModel(as_tuple=False)
    with pytest.raises(AttributeError), hooks.bypass(model, 1, as_tuple=True):
        hooks.decoder_layers(model)[1](hooks.decoder_layers(model)[0](torch.zeros(1, 1, 16)))


@pytest.mark.parametrize("kind", ["Gemma2", "Llama", "GPT2", "OPT", "Cohere", "Granite", "Mixtral"])
def test_the_head_alone_makes_the_logits_of_every_architecture(kind: str) -> None:
    """Scales, caps and biases of the logits; a mixture of experts, whose head reads more than hidden states."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    more = {"OPT": {"word_embed_proj_dim": 8}}.get(kind, {} if kind == "GPT2" else {"num_key_value_heads": 2})
    made = getattr(transformers, f"{kind}Config")(**sizes, **more, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    ids = torch.arange(3, 13).view(2, 5)
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool(), np.arange(2))
    resume.require_head(model, batch)
    stack = hooks.decoder_stack(model)
    assert "forward" not in vars(stack)
    wrapped = vars(stack)["forward"] = stack.forward  # as other libraries do
    with torch.no_grad():
        final, wanted = resume.final_states(model, batch), resume.logits(model, batch)
        with resume.head_alone(model) as to_logits:
            torch.testing.assert_close(to_logits(final[batch.scored]), wanted[batch.scored])
    assert vars(stack)["forward"] is wrapped
