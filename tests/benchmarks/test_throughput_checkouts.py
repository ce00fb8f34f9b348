"""Clones of other toolkits: small packages of the same shape, written here, are loaded, compared and refused."""

import sys
from pathlib import Path

import pytest

from benchmarks.throughput import equality, loading, peers
from benchmarks.throughput.adapters import PEERS
from crosscoders import EnvironmentFault

CROSSCODE = {
    "models/activations/topk.py": """
from torch import nn

class BatchTopkActivation(nn.Module):
    def __init__(self, k_per_example):
        super().__init__()
        self.k_per_example = k_per_example

    def forward(self, pre):
        values, indices = pre.flatten().topk(self.k_per_example * len(pre))
        return pre.new_zeros(pre.numel()).scatter(0, indices, values).view_as(pre)
""",
    "models/acausal_crosscoder.py": """
from collections import namedtuple

import torch
from torch import nn

from crosscode.utils import other_model

Result = namedtuple("Result", "latents_BL recon_acts_BMPD")


class ModelHookpointAcausalCrosscoder(nn.Module):
    def __init__(self, n_models, n_hookpoints, d_model, n_latents, activation_fn):
        super().__init__()
        self.W_enc_MPDL = nn.Parameter(torch.empty(n_models, n_hookpoints, d_model, n_latents))
        self.b_enc_L = nn.Parameter(torch.empty(n_latents))
        self.W_dec_LMPD = nn.Parameter(torch.empty(n_latents, n_models, n_hookpoints, d_model))
        self.b_dec_MPD = nn.Parameter(torch.empty(n_models, n_hookpoints, d_model))
        self.activation_fn = activation_fn

    def forward_train(self, x):
        latents = self.activation_fn(torch.einsum("bmpd,mpdl->bl", x, self.W_enc_MPDL) + self.b_enc_L)
        return Result(latents, torch.einsum("bl,lmpd->bmpd", latents, self.W_dec_LMPD) + self.b_dec_MPD)
""",
    "utils.py": """
other_model = None

def calculate_reconstruction_loss_summed_norm_MSEs(x, target):
    return (x - target).pow(2).sum(dim=(1, 2, 3)).mean()
""",
}
"""Its files, without any __init__.py."""

SPARSIFY = """
from collections import namedtuple

import torch
from torch import nn

Encoded = namedtuple("Encoded", "top_acts top_indices pre_acts")
Result = namedtuple("Result", "latent_indices fvu")


class SparseCoderConfig:
    def __init__(self, num_latents=0, k=32):
        self.num_latents, self.k = num_latents, k


class SparseCoder(nn.Module):
    def __init__(self, d_in, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = nn.Linear(d_in, cfg.num_latents)
        self.W_dec = nn.Parameter(self.encoder.weight.data.clone())
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def encode(self, x):
        pre = torch.relu(self.encoder(x - self.b_dec))
        return Encoded(*pre.topk(self.cfg.k, sorted=False), pre)

    def decode(self, acts, indices):
        latents = acts.new_zeros(len(acts), len(self.W_dec)).scatter(1, indices, acts)
        return latents @ self.W_dec + self.b_dec

    def forward(ARGUMENTS):
        acts, indices, _ = self.encode(x)
        variance = VARIANCE
        return Result(indices, (x - self.decode(acts, indices)).pow(2).sum() / variance)

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self):
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self):
        self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec
"""
OWN_VARIANCE = "(x - x.mean(0)).pow(2).sum()"


def clone(folder: Path, files: dict[str, str]) -> Path:
    """Write the files of a repository and return its folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def crosscode(folder: Path) -> Path:
    return clone(folder, {f"crosscode/{name}": text for name, text in CROSSCODE.items()})


def sparsify(folder: Path, arguments: str = "self, x, *, dead_mask=None", variance: str = OWN_VARIANCE) -> Path:
    text = SPARSIFY.replace("ARGUMENTS", arguments).replace("VARIANCE", variance)
    return clone(folder, {"sparsify/__init__.py": text})


def require_equal(name: str, folder: Path) -> None:
    equality.check(name, PEERS[name], loading.load(name, folder), peers.CHECK_SHAPE)


def test_a_clone_without_init_files_is_loaded_and_computes_what_its_adapter_says(tmp_path: Path) -> None:
    require_equal("crosscode", crosscode(tmp_path))
    assert not [module for module in sys.modules if module.split(".")[0] == "crosscode"]


@pytest.mark.parametrize(
    ("arguments", "variance"),
    [
        ("self, x, *, dead_mask=None", OWN_VARIANCE),
        ("self, x, y=None, *, dead_mask=None, total_variance=None", "total_variance"),
        ("self, x, y, *, embed=None, dead_mask, total_variance", "total_variance"),
    ],
)
def test_a_sparse_coder_is_given_only_what_its_forward_takes(arguments: str, variance: str, tmp_path: Path) -> None:
    require_equal("sparsify", sparsify(tmp_path, arguments, variance))


@pytest.mark.parametrize(
    ("file", "old", "new", "lacking"),
    [
        ("models/activations/topk.py", "BatchTopkActivation", "Other", "cannot import name 'BatchTopkActivation'"),
        ("utils.py", "def calculate", "def other", "'calculate_reconstruction_loss_summed_norm_MSEs' from"),
        ("models/acausal_crosscoder.py", "b_enc_L", "bias", "has no attribute 'b_enc_L'"),
        ("models/acausal_crosscoder.py", "d_model, n_latents, act", "d_model, act", "keyword argument 'n_latents'"),
        ("models/acausal_crosscoder.py", "forward_train", "run", "has no attribute 'forward_train'"),
        (
            "models/acausal_crosscoder.py",
            "self.b_dec_MPD = nn.Parameter(torch.empty(n_models, n_hookpoints, d_model))",
            "self.b_dec_MPD = None",
            r"ModelHookpointAcausalCrosscoder.b_dec_MPD is None, not of shape \(2, 1, 24\)",
        ),
    ],
)
def test_what_a_clone_lacks_is_named_with_the_clone(
    file: str, old: str, new: str, lacking: str, tmp_path: Path
) -> None:
    path = crosscode(tmp_path) / "crosscode" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(EnvironmentFault, match=rf"^--checkout crosscode={tmp_path} lacks .*{lacking}.*Do: check out"):
        peers.checked("crosscode", tmp_path)


def test_every_clone_that_lacks_something_has_one_line_and_none_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "time_rows", lambda *_, **__: pytest.fail("timed"))
    folders = {
        "sparsify": sparsify(tmp_path / "a"),
        "crosscode": clone(tmp_path / "b", {"crosscode/utils.py": ""}),
        "crosscoder_learning": clone(tmp_path / "c", {"dictionary_learning/__init__.py": "import no_such_module"}),
    }
    with pytest.raises(EnvironmentFault) as refusal:
        peers.rows(quick=True, checkouts=folders, installed=False)
    first, second = str(refusal.value).splitlines()
    assert first.startswith(f"--checkout crosscode={tmp_path / 'b'} lacks") and "crosscode.models" in first
    assert "no_such_module" in second and f"install what {tmp_path / 'c'} needs" in second


def test_a_package_of_another_place_is_not_taken_for_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone(tmp_path / "site", {"crosscode/__init__.py": ""})
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(EnvironmentFault, match=r"imported from .*site.crosscode\. Uninstall it"):
        loading.load("crosscode", crosscode(tmp_path / "clone"))
