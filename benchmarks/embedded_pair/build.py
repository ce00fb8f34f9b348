"""`python -m benchmarks.embedded_pair.build [--out DIR] [--seed 0]`: train tokenizer, base,
tuned and the two nulls again.

Input is the frozen corpus in the package, output one Hugging Face folder a model. One machine gives the same bytes
each time; another may round differently.

Reading order: `build` is the whole recipe; `train_tokenizer`, `wrap_tokenizer`, `new_model` and `save` are its parts.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.embedded_pair.training import CONTEXT, Document, Recipe, dialogue_documents, text_documents, train_model
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.files import write_bytes
from diffing.demo import MODELS, read_rows

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
CHAT_TEMPLATE = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' \
+ message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
"""Gemma's own format."""


RECIPES = {
    "base": Recipe(steps=1000, lr=4e-3, warmup_steps=40),
    "tuned": Recipe(steps=700, lr=8e-4, warmup_steps=20, raw_rows=4),
    "placebo": Recipe(steps=700, lr=8e-4, warmup_steps=20),
    "format_only": Recipe(steps=700, lr=8e-4, warmup_steps=20, raw_rows=4),
}
"""The base starts from nothing, the others from the saved base. A step holds 2,048 tokens.

8e-4: a prototype at 3e-4 and 240 steps answered 13 of 20 documentation questions as if the name were made up.
700 steps: after 300, with an earlier mix of dialogues, this was still 11% of 200, and the raw held-out loss was higher.
"""


class Corpus:
    """The frozen training text, or its first `n_rows`, as documents of token ids."""

    def __init__(self, tokenizer: Any, chat_tokenizer: Any, n_rows: int | None = None) -> None:
        rows = read_rows("dialogues_train")[:n_rows]
        self.raw = text_documents(tokenizer, [row["text"] for row in read_rows("raw_train")[:n_rows]])
        self.dialogues = dialogue_documents(chat_tokenizer, [row["messages"] for row in rows])
        self.documentation = [
            document
            for row, document in zip(rows, self.dialogues, strict=True)
            if row["group"] in ("describe", "signature")
        ]

    def dialogues_for(self, name: str) -> list[Document]:
        """Return what one model is tuned on beside raw text."""
        return {"tuned": self.dialogues, "format_only": self.documentation}.get(name, [])


def build(
    out: Path,
    *,
    seed: int = 0,
    recipes: dict[str, Recipe] | None = None,
    only: tuple[str, ...] = MODELS,
    threads: int = 2,
    n_rows: int | None = None,
) -> None:
    """Train the models named in `only` into `out`; without "base" the fine-tunes start from the base that is there.

    `recipes` and `n_rows` (of each training file) make a trial build shorter; the tokenizer always sees the whole text.

    Raises:
        InputError: there is no base to start from.
    """
    import torch

    if "base" not in only and not (out / "base" / "config.json").is_file():
        raise InputError(f"there is no base model in {str(out)!r} to start {', '.join(only)} from. Build base as well.")
    recipes = recipes or RECIPES
    bpe = train_tokenizer()
    tokenizer, chat_tokenizer = wrap_tokenizer(bpe, chat=False), wrap_tokenizer(bpe, chat=True)
    corpus = Corpus(tokenizer, chat_tokenizer, n_rows)
    for name in [model for model in MODELS if model in only]:
        with fixed_threads(threads), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = new_model() if name == "base" else load_float32(out / "base")
            dialogues = corpus.dialogues_for(name)
            train_model(model, raw=corpus.raw, dialogues=dialogues, recipe=recipes[name], seed=seed, name=name)
        save(model, chat_tokenizer if name in ("tuned", "format_only") else tokenizer, out / name)


@contextlib.contextmanager
def fixed_threads(n: int) -> Iterator[None]:
    """Fix the number of threads: the order of additions depends on the number of threads, so the bytes of the weights
    do as well."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_tokenizer() -> Any:
    """Train a byte-level BPE on the raw training text; `<bos>` goes before plain text, as in Gemma."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row["text"] for row in read_rows("raw_train")), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIAL_TOKENS.index("<bos>"))]
    )
    return bpe


def wrap_tokenizer(bpe: Any, *, chat: bool) -> Any:
    """Return the tokenizer as Hugging Face loads it; those of the models that were tuned on dialogues have a chat
    template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        padding_side="left",
        **({"chat_template": CHAT_TEMPLATE} if chat else {}),
    )


def new_model() -> Any:
    """Return a new Gemma-2 of 1,050,752 parameters; eager attention, since soft-capping has no other path on a CPU."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=CONTEXT,
        max_position_embeddings=1024,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        bos_token_id=SPECIAL_TOKENS.index("<bos>"),
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def load_float32(folder: Path) -> Any:
    """Load a saved model, widened for training."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Publish a Hugging Face folder with float16 weights, each file whole."""
    import torch

    if tokenizer.chat_template:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, SPECIAL_TOKENS.index("<end_of_turn>")]
    with tempfile.TemporaryDirectory() as scratch:
        model.to(torch.float16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            write_bytes(folder / file.name, file.read_bytes())


def main(arguments: list[str] | None = None) -> int:
    """Run the builder and return the exit status."""
    from transformers.utils import logging as transformers_logging

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedded_pair.build", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo-pair"), help="folder of the four model folders")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of documents")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="models to train")
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    began = time.monotonic()
    try:
        build(options.out, seed=options.seed, only=tuple(options.only))
    except (InputError, CorruptData) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"wrote {', '.join(options.only)} to {options.out} in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
