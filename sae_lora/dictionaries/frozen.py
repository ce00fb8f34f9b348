r"""A frozen dictionary at one hook point of one model: encode, decode, and what identifies it.

    f     = encode(x)       latents, (tokens, dict_size)
    x_hat = decode(f)       units of x, (tokens, d_model)

`Sae` holds plain weights such as Gemma Scope's, `SaeLens` an SAE of SAELens, `CrosscoderSide` one of our crosscoders
seen from one model, `PairSide` the same with both models at work, `Constant` the ablations that a dictionary is
compared with. `loading` makes them from files.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.models import hooks, points

Side = Literal["base", "tuned", "both"]
SIDES: tuple[Side, ...] = ("base", "tuned", "both")


Layout = Literal[
    "gemma-scope",
    "gemma-scope-2",
    "dictionary-learning",
    "qwen-scope",
    "sparsify",
    "sae-lens",
    "crosscoder",
    "layer-crosscoder",
    "constant",
]


@dataclass(frozen=True)
class DictionaryInfo:
    """What is known of a dictionary before its weights load."""

    layout: Layout
    path: str
    """Where it was read from; no part of its identity."""
    hook_point: str
    d_model: int
    dict_size: int
    settings: dict[str, Any]
    """Everything besides the weights that decides what it computes."""
    side: Side | None = None
    """Of a crosscoder of two models: whose reconstruction is taken."""
    model_names: tuple[str, ...] = ()
    """Models that it was trained on, as far as its files say."""
    model_hashes: tuple[str, ...] = ()
    """The same, as `crosscoders.models.names.hash_model` names them."""
    writes: str | None = None
    """Hook point of what it reconstructs; None: what it reads, as all but transcoders do."""


class FrozenDictionary(nn.Module):
    """Base of all layouts. Parameters take no gradient; gradients flow through to x."""

    def __init__(self, info: DictionaryInfo) -> None:
        super().__init__()
        self.info = info

    @property
    def hook_point(self) -> str:
        return self.info.hook_point

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it computes: that of its weights."""
        return next(t.dtype for t in self.state_dict().values() if t.is_floating_point())

    def begin(self, ids: Int[Tensor, "rows seq"], attention_mask: Tensor | None) -> None:
        """Take the ids before a forward pass of the model, for dictionaries that read more than x."""

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        raise NotImplementedError

    def decode(self, latents: Float[Tensor, "tokens dict_size"]) -> Float[Tensor, "tokens d_model"]:
        raise NotImplementedError

    def reconstruct(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens dict_size"], Float[Tensor, "tokens d_model"]]:
        """Return the latents and what stands in place of x: decode(encode(x)), but for controls that need x itself."""
        latents = self.encode(x)
        return latents, self.decode(latents)

    def forward(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """Return what stands in place of x."""
        return self.reconstruct(x)[1]

    def content_hash(self) -> str:
        """Return sha256 over layout, settings, side and every tensor; equal for equal content under any path.

        The hook point is not part of it: the same weights at another place are the same dictionary, misplaced, and the
        sidecar records both.
        """
        digest = hashlib.sha256(files.hash_json([self.info.layout, self.info.settings, self.info.side]).encode())
        for name, value in sorted(self.state_dict().items()):
            data = value.detach().cpu().contiguous()
            digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
            digest.update(data.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return what a sidecar records of it."""
        described = {
            key: value for key, value in asdict(self.info).items() if key not in ("model_names", "model_hashes")
        }
        return {
            "hash": self.content_hash(),
            "dtype": str(self.dtype).removeprefix("torch."),
            **described,
            "control": None,
        }


class Sae(FrozenDictionary):
    r"""f = gate(ReLU(pre)), pre = x W_enc + b_enc; x_hat = f W_dec + b_dec (+ x W_skip in a transcoder).

    Settings: gate "relu"; "jumprelu", f_j = 0 where pre_j <= threshold_j; or "topk", all but the k largest of a token
    are 0; or "gated", f = ReLU(scale pre + shift) where pre > 0. apply_b_dec_to_input: pre reads x - b_dec. Source:
    Rajamanoharan et al. 2024, arXiv 2407.14435 and 2404.16014; Lieberum et al. 2024, arXiv 2408.05147; Gao et al. 2024,
    arXiv 2406.04093.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    scale: Tensor
    shift: Tensor
    W_skip: Tensor

    def __init__(self, info: DictionaryInfo, tensors: dict[str, Tensor]) -> None:
        super().__init__(info)
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        settings = self.info.settings
        pre = torch.addmm(self.b_enc, x - self.b_dec if settings["apply_b_dec_to_input"] else x, self.W_enc)
        if settings["gate"] == "gated":
            return torch.relu(pre * self.scale + self.shift) * (pre > 0)
        positive = torch.relu(pre)
        if settings["gate"] == "jumprelu":
            return positive * (pre > self.threshold)
        if settings["gate"] == "topk":
            values, indices = positive.topk(settings["k"], dim=1, sorted=False)
            return torch.zeros_like(positive).scatter(1, indices, values)
        return positive

    def decode(self, latents: Float[Tensor, "tokens dict_size"]) -> Float[Tensor, "tokens d_model"]:
        return torch.addmm(self.b_dec, latents, self.W_dec)

    def reconstruct(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens dict_size"], Float[Tensor, "tokens d_model"]]:
        latents, x_hat = super().reconstruct(x)
        return latents, x_hat + x @ self.W_skip if hasattr(self, "W_skip") else x_hat


class SaeLens(FrozenDictionary):
    """An SAE as SAELens computes it."""

    def __init__(self, info: DictionaryInfo, sae: nn.Module) -> None:
        super().__init__(info)
        self.sae: Any = sae.requires_grad_(False).eval()

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        latents: Tensor = self.sae.encode(x)
        return latents

    def decode(self, latents: Float[Tensor, "tokens dict_size"]) -> Float[Tensor, "tokens d_model"]:
        x_hat: Tensor = self.sae.decode(latents)
        return x_hat

    def reconstruct(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens dict_size"], Float[Tensor, "tokens d_model"]]:
        latents, x_hat = super().reconstruct(x)
        return latents, x_hat + x @ self.sae.W_skip.T if hasattr(self.sae, "W_skip") else x_hat


class CrosscoderSide(FrozenDictionary):
    """A crosscoder where only one model runs: its activation stands in for every model in the encoder.

    side "base" or "tuned": that model's reconstruction; "both": the mean of the two. The latents are therefore not
    those of `Crosscoder.encode` on the pair, except where both models agree.
    """

    def __init__(self, info: DictionaryInfo, crosscoder: Crosscoder) -> None:
        super().__init__(info)
        self.crosscoder = crosscoder.requires_grad_(False)

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        return self.crosscoder.encode(x[:, None].expand(-1, self.crosscoder.config.n_models, -1))

    def decode(self, latents: Float[Tensor, "tokens dict_size"]) -> Float[Tensor, "tokens d_model"]:
        x_hat = self.crosscoder.decode(latents)
        return x_hat[:, SIDES.index(self.info.side)] if self.info.side in ("base", "tuned") else x_hat.mean(dim=1)


class PairSide(CrosscoderSide):
    """One side of a crosscoder with the latents of the pair: the other model runs beside, on the same ids.

    side "base" or "tuned": the model that it is spliced into, and whose reconstruction is taken.
    """

    def __init__(self, info: DictionaryInfo, crosscoder: Crosscoder, other: nn.Module) -> None:
        super().__init__(info, crosscoder)
        self.others = [other]  # in a list, so that its weights are no part of the dictionary
        self.beside: Tensor | None = None

    def begin(self, ids: Int[Tensor, "rows seq"], attention_mask: Tensor | None) -> None:
        self.beside = run_beside(self.others[0], [self.hook_point], ids, attention_mask, self.dtype)[self.hook_point]

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        assert self.beside is not None and self.beside.shape == x.shape
        pair = (x, self.beside) if self.info.side == "base" else (self.beside, x)
        return self.crosscoder.encode(torch.stack(pair, dim=1))


def run_beside(
    model: nn.Module,
    hook_points: list[str],
    ids: Int[Tensor, "rows seq"],
    attention_mask: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Float[Tensor, "tokens d_model"]]:
    """Return the activations of a model that runs beside the spliced one, on the same ids.

    Raises:
        InputError: a pass that continues a key-value cache, which the model beside does not have.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(ids)
    if attention_mask.shape != ids.shape:
        raise InputError("the other model of the crosscoder keeps no key-value cache. Generate with use_cache=False.")
    activations = hooks.run_to(model, hook_points, ids, attention_mask)
    # a clone is no inference tensor
    return {name: value.clone().flatten(0, 1).to(dtype) for name, value in activations.items()}


class Constant(FrozenDictionary):
    """Not a dictionary: one vector in place of every activation, for zero and mean ablation."""

    value: Tensor

    def __init__(self, hook_point: str, value: Float[Tensor, " d_model"]) -> None:
        super().__init__(DictionaryInfo("constant", "", hook_point, len(value), 0, {}))
        self.register_buffer("value", value)

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        return x[:, :0]

    def decode(self, latents: Float[Tensor, "tokens dict_size"]) -> Float[Tensor, "tokens d_model"]:
        return self.value.expand(len(latents), -1)


def is_transcoder(info: DictionaryInfo) -> bool:
    """Tell whether a dictionary computes something else than what it reads."""
    return info.writes not in (None, info.hook_point)


def require_spliceable(info: DictionaryInfo) -> None:
    """Raise InputError for a transcoder, whose output is no reconstruction of what it reads."""
    if is_transcoder(info):
        raise InputError(
            f"dictionary {info.path!r} is a transcoder: it reads {info.hook_point!r} and computes {info.writes!r}, "
            "so it cannot be spliced. Give an SAE."
        )


def require_fit(info: DictionaryInfo, *, d_model: int, n_layers: int, model_name: str, model_hash: str | None) -> None:
    """Check a dictionary against a model, before the weights of either load.

    Raises:
        InputError: another width, a layer that the model does not have, or a record that it was trained on others.
    """
    if info.d_model != d_model:
        raise InputError(
            f"dictionary {info.path!r} has d_model {info.d_model} but model {model_name!r} has {d_model}. "
            "Choose a dictionary of this model."
        )
    points.require_layer(info.hook_point, n_layers, model_name)
    if info.model_hashes and model_hash is not None and model_hash not in info.model_hashes:
        raise InputError(
            f"dictionary {info.path!r} was trained on {' and '.join(info.model_names)}, not on {model_name!r}: its "
            "record of their weights differs. Choose a dictionary of this model, or say --foreign-dictionary."
        )
