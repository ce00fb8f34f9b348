"""Layers that return a tensor, and layers that return a tuple: read, edited, left out and resumed alike."""

import numpy as np
import pytest
import torch
from standins import LanguageModel

from crosscoders.models import hooks
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
