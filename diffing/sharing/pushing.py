"""A run to a repository of the hub, with a card: `push_to_hub`, and `write_repository` for what it uploads."""

import shutil
import tempfile
from pathlib import Path

from crosscoders.common.files import write_bytes
from crosscoders.common.hub import upload
from crosscoders.formats.load import load_crosscoder
from diffing.sharing.cards import card, read_sharing


def push_to_hub(run: str | Path, repo: str, *, private: bool = True) -> str:
    """Upload what a folder holds, with a card made from it, and return the address of the repository.

    run: a crosscoder's run, a folder of `sae-lora finetune-sae`, `sae-lora fit` or `diffing topk-lora fit`. It is read
    again with `load_crosscoder`, `load_dictionary`, `load_adapter` or `load_corrector`, and `TopKLoRA.load`, which take
    OWNER/NAME.

    Raises:
        InputError: nothing to push, or `repo` is no name of a repository.
        CorruptData: a file of the run cannot be read.
        EnvironmentFault: the hub refuses, or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_repository(run, repo, Path(folder))
        return upload(Path(folder), repo, private=private)


def write_repository(run: str | Path, repo: str, folder: Path) -> None:
    """Write the files of a repository, README.md last; a crosscoder without the paths that its run notes.

    Raises:
        InputError: nothing to push.
        CorruptData: a file of the run cannot be read.
    """
    shared = read_sharing(Path(run))
    folder.mkdir(parents=True, exist_ok=True)
    if shared.kind == "crosscoder":
        load_crosscoder(run).save(folder)
    for path in shared.files:
        shutil.copyfile(path, folder / path.name)
    write_bytes(folder / "README.md", card(shared, repo).encode())
