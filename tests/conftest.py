"""Shared fixtures: a tiny Gemma-2 pair with its own tokenizer, made once; shapes are checked at call time."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if importlib.util.find_spec("triton"):
    import crosscoders.kernels.triton_source  # noqa: F401  # before the hook, behind which Triton does not find `tl`

from jaxtyping import install_import_hook

_hook = install_import_hook(["crosscoders", "sae_lora", "diffing"], "typecheck.checked")
_hook.__enter__()

import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from crosscoders import CacheConfig, EnvironmentFault, cache_activations  # noqa: E402
from crosscoders.common import files, progress  # noqa: E402

torch.set_num_threads(1)

LONG = ("test_notebooks.py", "test_demo.py", "test_browser.py", "test_report_browser.py", "test_site.py")
"""Files of minutes: first, so that no worker ends with one of them while the other is idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
)
THINGS = ("file", "string", "number", "table", "line", "word", "node", "key")
PARTS = ("name", "size", "sum", "list", "path")
TEXTS = [f"Return the {part} of a {thing}. The {thing} must not be empty." for part in PARTS for thing in THINGS]


@contextlib.contextmanager
def failing_write(monkeypatch: pytest.MonkeyPatch, writer: str, when: Callable[[int, Path], bool]) -> Iterator[None]:
    """`store.<writer>` fails at writes whose number, from 1, and path fulfil `when`; what is run must fail with it."""
    real, made = getattr(files, writer), list[Path]()

    def failing(path: Path, data: Any) -> files.Written:
        made.append(path)
        if when(len(made), path):
            raise EnvironmentFault("no space left (planted)")
        return real(path, data)

    with monkeypatch.context() as patched, pytest.raises(EnvironmentFault, match="planted"):
        patched.setattr(files, writer, failing)
        yield


def make_tokenizer(folder: Path, *, template: bool = True, words: list[str] | None = None, bos: bool = True) -> None:
    """A byte-level BPE tokenizer with Gemma's special tokens, saved to a folder; without `bos` it puts nothing before a
    text, as Qwen's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(words or TEXTS, trainer)
    special_tokens = {"eos_token": "<eos>", "pad_token": "<pad>"}
    if bos:
        special_tokens["bos_token"] = "<bos>"
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, **special_tokens)
    if template:
        fast.chat_template = CHAT_TEMPLATE if bos else CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    fast.save_pretrained(folder)


def make_model(folder: Path, *, seed: int, d_model: int = 16, n_layers: int = 3) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=320, hidden_size=d_model, intermediate_size=24, num_hidden_layers=n_layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, max_position_embeddings=256,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(config)
    if seed:  # the tuned model: the base, moved a little
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)


class Pair:
    """Folders of a base and a tuned model and of their data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.tuned = str(folder / "base"), str(folder / "tuned")
        self.data = str(folder / "data.jsonl")

    def config(self, out: Path | str, **changes: object) -> CacheConfig:
        settings: dict[str, object] = {
            "base": self.base, "tuned": self.tuned, "hook_point": "blocks.1.hook_resid_post", "data": self.data,
            "out": str(out), "n_tokens": 600, "shard_tokens": 128, "batch_rows": 4, "dtype": "float32",
        }  # fmt: skip
        return CacheConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    made = Pair(tmp_path_factory.mktemp("pair"))
    for name, seed in (("base", 0), ("tuned", 1)):
        make_tokenizer(made.folder / name, template=name == "tuned")
        make_model(made.folder / name, seed=seed)
    rows: list[dict[str, object]] = [{"text": text, "group": "raw"} for text in TEXTS]
    for text in TEXTS[:20]:
        messages = [{"role": "user", "content": "What does it do?"}, {"role": "assistant", "content": text}]
        rows.append({"messages": messages, "group": "describe"})
    Path(made.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="session")
def cache_folder(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished float32 cache of 600 tokens in 5 shards; do not write to it."""
    out = tmp_path_factory.mktemp("cache") / "cache"
    cache_activations(pair.config(out))
    return out


@pytest.fixture(scope="module")
def bar_labels() -> Iterator[list[str]]:
    """The labels of all progress bars that a module's tests made so far; clear it before the command in question."""
    labels: list[str] = []

    class Recorded(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            labels.append(kwargs["desc"])
            super().__init__(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(progress, "tqdm", Recorded)
        yield labels
