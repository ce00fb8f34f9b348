"""The crosscoder: gates, units, folding, norms, formats of others."""

import shutil
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file
from small_crosscoders import PARITY, make, sample

from crosscoders import CorruptData, InputError, load_crosscoder
from crosscoders.dictionary.crosscoder import batch_top_k

PEERS = [
    "dictionary_learning_relu",
    "dictionary_learning_batchtopk",
    "dictionary_learning_batchtopk_normalized",
    "dictionary_learning_batchtopk_saenorm",
    "ckkissane",
]


@pytest.mark.parametrize("code_norm", ["sum", "concat", "none"])
@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_encode_equals_the_loop_written_reference(activation: str, code_norm: str) -> None:
    cc, x = make(activation, code_norm), sample()
    expected = reference.latents(cc, x, threshold=1.5 if activation == "batchtopk" else None)
    torch.testing.assert_close(cc.encode(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_inference_latents_do_not_depend_on_the_rest_of_the_batch() -> None:
    cc, x = make(), sample()
    alone = torch.cat([cc.encode(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(cc.encode(x), alone)


def test_batchtopk_keeps_exactly_k_per_token_on_average_and_the_largest() -> None:
    scaled = torch.rand(5, 7, generator=torch.Generator().manual_seed(1))
    mask = batch_top_k(scaled, 2)
    assert int(mask.sum()) == 10
    assert scaled[mask].min() >= scaled[~mask].max()
    assert int(batch_top_k(torch.zeros(5, 7), 2).sum()) == 10  # ties: still exactly k * batch
    assert batch_top_k(scaled, 7).all()  # k = dict_size


def test_selection_is_by_norm_scaled_latents_and_values_are_not_scaled() -> None:
    cc, x = make(), sample()
    positive = cc.encode(x, gate="relu")
    chosen = cc.encode(x, gate="batchtopk", k=1)
    scaled = positive * cc.decoder_norms.sum(dim=1)
    kept = chosen > 0
    assert scaled[kept].min() >= scaled[~kept].max()
    assert torch.equal(chosen[kept], positive[kept])


def test_a_threshold_that_was_never_tracked_is_plain_relu() -> None:
    cc, x = make(), sample()
    cc.threshold.fill_(-1.0)
    assert torch.equal(cc.encode(x), cc.encode(x, gate="relu"))


def test_rescaling_the_data_of_a_model_and_its_input_scale_changes_nothing_but_the_units() -> None:
    cc, x = make(), sample()
    factor = torch.tensor([10.0, 0.1])[:, None]
    other = make()
    other.input_scale.copy_(cc.input_scale / factor[:, 0])
    other.input_mean.copy_(cc.input_mean * factor)
    torch.testing.assert_close(other.encode(x * factor), cc.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other(x * factor), cc(x) * factor, rtol=1e-4, atol=1e-4)


def test_permuting_latents_permutes_everything_and_keeps_the_reconstruction() -> None:
    cc, x, order = make(), sample(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    other = make()
    other.W_enc.copy_(cc.W_enc[:, :, order])
    other.b_enc.copy_(cc.b_enc[order])
    other.W_dec.copy_(cc.W_dec[order])
    torch.testing.assert_close(other.encode(x), cc.encode(x)[:, order])
    torch.testing.assert_close(other(x), cc(x), rtol=1e-5, atol=1e-5)


def test_swapping_the_models_mirrors_the_relative_decoder_norm() -> None:
    cc, other = make(), make()
    other.W_dec.copy_(cc.W_dec.flip(1))
    torch.testing.assert_close(other.relative_decoder_norm, 1 - cc.relative_decoder_norm)


def test_relative_decoder_norm_on_paper() -> None:
    cc = make()
    cc.W_dec.zero_()
    cc.W_dec[0, 0, 0] = 2.0  # base only
    cc.W_dec[1, 1, 0] = 3.0  # tuned only
    cc.W_dec[2, :, 1] = 4.0  # equal
    cc.W_dec[3, 0, 0], cc.W_dec[3, 1, 2] = 1.0, 4.0  # 0.5 * (1 + 3 / 4)
    assert cc.relative_decoder_norm[:5].tolist() == [0.0, 1.0, 0.5, 0.875, 0.5]


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_folding_changes_nothing_however_often(activation: str) -> None:
    cc, x = make(activation), sample()
    once = cc.fold()
    for folded in (once, once.fold(), once.fold().fold()):
        torch.testing.assert_close(folded.encode(x), cc.encode(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded(x), cc(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded.decoder_norms, cc.decoder_norms)
        torch.testing.assert_close(folded.relative_decoder_norm, cc.relative_decoder_norm)
        torch.testing.assert_close(folded.decoder_bias(), cc.decoder_bias(), rtol=1e-4, atol=1e-5)
    assert not cc.is_folded
    # the folded weights themselves take raw activations: no normaliser is left to apply
    raw = torch.einsum("nmd,mdj->nj", x, once.W_enc) + once.b_enc
    torch.testing.assert_close(torch.relu(raw), cc.encode(x, gate="relu"), rtol=1e-4, atol=1e-5)


def test_one_model_is_an_autoencoder() -> None:
    cc, x = make(n_models=1), sample(n_models=1)
    assert cc(x).shape == x.shape
    with pytest.raises(InputError, match="compares two models; this crosscoder has 1"):
        _ = cc.relative_decoder_norm


@pytest.mark.parametrize("folded", [False, True])
def test_save_and_load_gives_the_same_function_and_bytes(tmp_path: Path, folded: bool) -> None:
    cc, x = (make().fold() if folded else make()), sample()
    cc.save(tmp_path / "a", provenance={"pair": "x"})
    loaded = load_crosscoder(tmp_path / "a")
    assert loaded.config == cc.config
    assert torch.equal(loaded.encode(x), cc.encode(x)) and torch.equal(loaded(x), cc(x))
    loaded.save(tmp_path / "b", provenance={"pair": "x"})
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_flipped_bit_in_saved_weights_is_refused(tmp_path: Path) -> None:
    make().save(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (tmp_path / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(CorruptData, match="does not match its checksum"):
        load_crosscoder(tmp_path)


def test_the_wrong_width_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"shape \(4, 2, 5\) do not fit this crosscoder, which reads \(batch, 2, 3\)"):
        make().encode(torch.zeros(4, 2, 5))


# ------------------------------------------------------------------------------------------------- what peers publish


@pytest.mark.parametrize("name", PEERS)
def test_published_layouts_encode_and_decode_to_the_recorded_tensors(name: str) -> None:
    cc, recorded = load_crosscoder(PARITY / name), load_file(PARITY / name / "expected.safetensors")
    torch.testing.assert_close(cc.encode(recorded["x"]), recorded["latents"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cc.decode(recorded["latents"]), recorded["reconstruction"], rtol=1e-4, atol=1e-5)
    if "code_normalization" in recorded:
        torch.testing.assert_close(cc.code_norm, recorded["code_normalization"])
        scaled = recorded["latents"] * cc.code_norm
        torch.testing.assert_close(scaled, recorded["scaled_latents"], rtol=1e-4, atol=1e-5)
    if "latents_batchtopk" in recorded:
        selected = cc.encode(recorded["x"], gate="batchtopk")
        torch.testing.assert_close(selected, recorded["latents_batchtopk"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PEERS if name.startswith("dictionary_learning")])
def test_a_pt_state_dict_gives_the_same_crosscoder_as_safetensors(name: str) -> None:
    from_pt, from_folder = load_crosscoder(PARITY / name / "model_final.pt"), load_crosscoder(PARITY / name)
    assert from_pt.config == from_folder.config
    for key, value in from_folder.state_dict().items():
        assert torch.equal(from_pt.state_dict()[key], value), key


def test_ckkissane_factors_are_taken_as_an_argument() -> None:
    recorded = load_file(PARITY / "ckkissane" / "expected.safetensors")
    factors = torch.tensor([0.25, 4.0])
    cc = load_crosscoder(PARITY / "ckkissane", input_scale=factors.tolist())
    raw = recorded["x"] / factors[:, None]
    torch.testing.assert_close(cc.encode(raw), recorded["latents"], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="3 factors; this crosscoder reads 2"):
        load_crosscoder(PARITY / "ckkissane", input_scale=[1.0, 1.0, 1.0])
    with pytest.raises(InputError, match="input_scale is for the ckkissane layout"):
        load_crosscoder(PARITY / "dictionary_learning_relu", input_scale=[1.0, 1.0])


class Payload:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("open('canary', 'w').close()",))


def test_a_pt_file_that_needs_unpickling_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PARITY / "dictionary_learning_relu", tmp_path / "evil")
    (tmp_path / "evil" / "model.safetensors").unlink()
    torch.save({"encoder.weight": Payload()}, tmp_path / "evil" / "model_final.pt")
    with pytest.raises(InputError, match=r"model_final.pt is refused: it needs unpickling of more than tensors"):
        load_crosscoder(tmp_path / "evil")
    assert not (tmp_path / "canary").exists()


def test_a_git_lfs_pointer_in_place_of_weights_says_so(tmp_path: Path) -> None:
    shutil.copytree(PARITY / "dictionary_learning_relu", tmp_path / "cc")
    (tmp_path / "cc" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match=r"is a git-lfs pointer, not the file itself\. Run: git lfs pull"):
        load_crosscoder(tmp_path / "cc")


@pytest.mark.parametrize(
    "data, cause",
    [
        (b"", "header length is impossible"),
        (b"<html>gone</html>", "header length is impossible"),
        ((2**40).to_bytes(8, "little") + b"{}", "header length is impossible"),
        ((2).to_bytes(8, "little") + b"{]", "is not a safetensors file"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, data: bytes, cause: str) -> None:
    shutil.copytree(PARITY / "dictionary_learning_relu", tmp_path / "cc")
    (tmp_path / "cc" / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptData, match=cause):
        load_crosscoder(tmp_path / "cc")


def test_a_folder_without_a_crosscoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no crosscoder: no config.json or cfg.json .*notes.txt"):
        load_crosscoder(tmp_path)
    with pytest.raises(InputError, match="there is no '/nowhere/at/all'"):
        load_crosscoder("/nowhere/at/all")
