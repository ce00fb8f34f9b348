"""The name of a model -> its configuration and its tokenizer, or one line that says why there is none.

A name is a local folder or a hub id.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.notices import without_notices
from crosscoders.models.broken import require_json

PROBE = "The quick brown fox, def f(x): return 42\n\tNäïve 数据 <end>"
"""Two tokenizers are compared on it."""


def require_no_lost_path(name: str) -> None:
    """Raise InputError for what can only be a path and leads nowhere, or is more likely one: asking the hub for it
    takes half a minute of retries where there is no network."""
    if Path(name).is_dir():
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise InputError(
            f"model folder {name!r} does not exist. Check the path, or give a hub id such as 'google/gemma-2-2b'."
        )
    parent = Path(name).parent
    if "/" in name and parent.is_dir() and not _in_local_store(name):
        raise InputError(
            f"{str(parent)!r} is a folder here and has no model folder {Path(name).name!r}. "
            "Check the path; for the hub's repository of that name, run from another folder."
        )


def _in_local_store(name: str) -> bool:
    """Say whether the hub's repository of that name was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    try:
        paths = [try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json")]
    except ValueError:  # no name of a repository
        return False
    return any(isinstance(path, str) for path in paths)


def is_adapter(name: str) -> bool:
    """Say whether a folder or repository is a PEFT adapter."""
    if Path(name).is_dir():
        return (Path(name) / "adapter_config.json").is_file()
    from transformers.utils import cached_file

    try:
        path = cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        return False
    return path is not None


def load_auto(name: str, what: str) -> Any:
    """Load a configuration or tokenizer, or raise one line that says why there is none."""
    import transformers

    auto = transformers.AutoConfig if what == "config" else transformers.AutoTokenizer
    try:
        return auto.from_pretrained(name, trust_remote_code=False)  # without it, transformers asks on a terminal
    except Exception as error:  # what a damaged file raises is as it may be
        require_json(name)
        lines = str(error).splitlines() or [type(error).__name__]
        nowhere = "" if Path(name).is_dir() else ", and no local folder of that name"
        raise InputError(
            f"no {what} for model {name!r}{nowhere}: {lines[0]} "
            "Give a local folder, or a hub id that you can reach "
            "(gated models need HF_TOKEN and an accepted licence)."
        ) from None


def one_tokenizer(base: str, tuned: str, chosen: str | None, adapter: str | None) -> Any:
    """Return the tokenizer of the tuned model (its chat template is the right one), after comparing it with the
    base's."""
    if chosen is not None:
        return load_auto(chosen, "tokenizer")
    base_tokenizer = load_auto(base, "tokenizer")
    if adapter is not None and not (Path(adapter) / "tokenizer_config.json").is_file():
        return base_tokenizer
    tuned_tokenizer = load_auto(tuned, "tokenizer")
    first, second = base_tokenizer.get_vocab(), tuned_tokenizer.get_vocab()
    if first != second:
        token = min(set(first.items()) ^ set(second.items()), key=lambda item: item[1])[0]
        raise InputError(
            f"the tokenizers differ: token {token!r} has id {first.get(token)} in {base!r} and {second.get(token)} in "
            f"{tuned!r}. Both models must read the same ids; name one that fits both with --tokenizer."
        )
    if base_tokenizer(PROBE)["input_ids"] != tuned_tokenizer(PROBE)["input_ids"]:
        raise InputError(
            f"the tokenizers of {base!r} and {tuned!r} have one vocabulary but split text differently. "
            "Name the one that fits both with --tokenizer."
        )
    return tuned_tokenizer if tuned_tokenizer.chat_template or not base_tokenizer.chat_template else base_tokenizer


def identity(entry: Any) -> Any:
    """Return what of a recorded value decides whether two are the same: of a {name, hash} the hash, since the same
    model under another path is the same model; anything else as it is."""
    return entry.get("hash") if isinstance(entry, dict) else entry


def hash_model(name: str) -> str:
    """Return sha256 over a local folder's weights, configuration and adapter files; for a hub id its commit.

    Raises:
        InputError: no commit is known of a hub id.
    """
    folder = Path(name)
    if folder.is_dir():
        endings = (".safetensors", ".bin", "config.json")
        chosen = sorted(f for f in folder.iterdir() if f.name.endswith(endings) or f.name == "chat_template.jinja")
        return files.hash_json([[f.name, files.hash_file(f)] for f in chosen])
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    for file in ("config.json", "adapter_config.json"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        commit = extract_commit_hash(path, None)
        if commit is not None:
            return f"commit:{commit}"
    raise InputError(
        f"no commit is known of the hub model {name!r}, so another version of it would be taken for the same. "
        "Download it into a folder, and give that."
    )


def require_two_models(base: str, tuned: str) -> None:
    """Raise InputError where base and tuned are one model, under one name or as two folders of the same files."""
    are_folders = Path(base).is_dir() and Path(tuned).is_dir()
    if base == tuned or (are_folders and hash_model(base) == hash_model(tuned)):
        raise InputError(f"base {base!r} and tuned {tuned!r} are the same model. Name two that differ.")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers, and what it and peft import: loading a cut-off model reports every missing layer as
    unexpected, which is meant; restores what it found."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), without_notices():
            warnings.simplefilter("ignore", FutureWarning)  # renames between peft and transformers
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
