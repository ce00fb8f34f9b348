"""The text of each token: spaces and characters of several bytes survive."""

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from crosscoders.text.decoding import token_text, token_texts

WORDS = "the quick brown fox".split()
THUMB = "\U0001f44d"


def byte_fallback() -> Any:
    """Llama-2's kind: words with their space, bytes for what is unknown, a decoder that strips the first space."""
    vocab = {"<unk>": 0, "<s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    merges = []
    for piece in ["\u2581", *dict.fromkeys("".join([*WORDS, "a"]))]:
        vocab.setdefault(piece, len(vocab))
    for word in WORDS:
        left = "\u2581"
        for character in word:
            merges.append((left, character))
            left += character
            vocab.setdefault(left, len(vocab))
    raw = Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges)), byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")


def byte_level() -> Any:
    """GPT-2's kind."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw)


def metaspace() -> Any:
    """T5's kind: the decoder drops the first space."""
    raw = Tokenizer(models.WordLevel({"<unk>": 0, **{f"\u2581{word}": i + 1 for i, word in enumerate([*WORDS, "a"])}}))
    raw.model.unk_token = "<unk>"
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def texts_of(tokenizer: Any, text: str) -> list[str]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and all(isinstance(piece, str) for piece in texts)
    return texts


@pytest.mark.parametrize("make", [byte_fallback, byte_level])
@pytest.mark.parametrize(
    "text",
    [
        f"the quick brown fox {THUMB}",
        f"the {THUMB}{THUMB} fox",
        "\u00e9\u00e8 the \u65e5\u672c\u8a9e fox",
        "the  quick   fox",
        f"{THUMB} the",
        "\u0928\u092e\u0938\u094d\u0924\u0947",
    ],
)
def test_the_texts_of_all_tokens_are_the_text(make: Any, text: str) -> None:
    assert "".join(texts_of(make(), text)) == text


def test_words_keep_their_space_under_decoders_that_strip_it() -> None:
    for make in (byte_fallback, metaspace):
        assert texts_of(make(), "the quick brown fox") == ["the", " quick", " brown", " fox"]


def test_a_character_of_several_tokens_stands_at_the_first_of_them() -> None:
    assert texts_of(byte_fallback(), f"the {THUMB} fox") == ["the", " ", THUMB, "", "", "", " fox"]
    assert texts_of(byte_level(), "\u00e9fox")[:2] == ["\u00e9", ""]


@pytest.mark.parametrize("make", [byte_fallback, byte_level])
def test_bytes_of_a_character_that_is_cut_off_are_written_as_bytes(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode(f"the fox{THUMB}", add_special_tokens=False)
    assert token_texts(tokenizer, ids[:-1])[-3:] == ["<0xF0>", "<0x9F>", "<0x91>"]
    assert token_texts(tokenizer, ids[-4:-2]) == ["<0xF0>", "<0x9F>"]


def test_a_token_alone_keeps_its_space_and_its_byte() -> None:
    tokenizer = byte_fallback()
    known = tokenizer.convert_tokens_to_ids
    assert token_text(tokenizer, known("\u2581fox")) == " fox"
    assert token_text(tokenizer, known("f")) == "f"
    assert token_text(tokenizer, known("<0xF0>")) == "<0xF0>"
    assert token_text(metaspace(), 3) == " brown"


def test_no_tokens_have_no_text() -> None:
    assert token_texts(byte_level(), []) == []
