"""What a fit needs of the frozen model, kept for every batch: what stands at the lowest hook point with its dictionary
spliced in, and the teacher's final hidden states, after the last norm.

Logits are not kept: the model's own head makes them from the final hidden states. In memory, or in a folder whose name
is a hash of everything that decides the numbers, so that fits with other ranks, seeds and layers read it too:

    FOLDER/KEY/00000000.safetensors ...    one file for each batch, `x_hat` and `final`
    FOLDER/KEY/manifest.json               size and checksum of every file; written last
"""

from pathlib import Path
from typing import Any

import torch

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.progress import Progress, say
from crosscoders.common.records import FileRecord, Record
from crosscoders.models.resume import final_states
from sae_lora.dictionaries.frozen import FrozenDictionary
from sae_lora.fitting.inputs import Plan
from sae_lora.fitting.objective import States, states
from sae_lora.fitting.settings import FitConfig
from sae_lora.lora.adapter import lora_off

FORMAT_VERSION = 1


class StatesRecord(Record):
    """manifest.json of a folder of states; what else it says is in the folder's name."""

    version = FORMAT_VERSION
    again = "remove this folder"
    format_version: int
    files: list[FileRecord]


class StoredStates:
    """States of each batch of a plan, by its number."""

    def __init__(self, folder: Path | None, described: dict[str, Any], dictionary: FrozenDictionary) -> None:
        self.described, self.dictionary = described, dictionary
        self.folder = None if folder is None else folder / files.hash_json(described)[:16]
        self.held: dict[int, States] = {}
        self.files: list[files.Written] = []

    def fill(self, model: Any, plan: Plan, batch_rows: int, device: torch.device) -> None:
        """Run the model without adapter over all batches; what a folder holds already is not run again.

        Raises:
            EnvironmentFault: another process fills the folder, or the disk is full.
            CorruptData: the folder's manifest is of something else.
        """
        if self.folder is None:
            self._run(model, plan, batch_rows, device)
            return
        path = self.folder / "manifest.json"
        with files.exclusive(self.folder):
            if not path.is_file():
                self._run(model, plan, batch_rows, device)
                entries = [file._asdict() for file in self.files]
                files.write_json(path, {"format_version": FORMAT_VERSION, **self.described, "files": entries})
        manifest = files.read_model(path, StatesRecord)
        self.files = [files.Written(**file) for file in manifest["files"]]
        say(f"states of {len(self.files):,} batches in {self.folder}")

    def _run(self, model: Any, plan: Plan, batch_rows: int, device: torch.device) -> None:
        progress = Progress("store", total=len(plan.rows.batches(batch_rows)), start=0, unit="batch")
        for number, batch in enumerate(plan.batches(batch_rows, device)):
            path = self._path(number)
            if path is not None and path.is_file():  # a whole file of a run that was interrupted
                self.files.append(files.written(path))
            else:
                states_of_batch = states(model, self.dictionary, batch, plan.keep_ids)
                if path is None:
                    self.held[number] = states_of_batch
                else:
                    self.files.append(files.write_tensors(path, states_of_batch._asdict()))
            progress.update(1)
        progress.close()

    def _path(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{number:08d}.safetensors"

    def read(self, number: int, device: torch.device) -> States:
        """Read the states of a batch; a file is checked against its checksum each time.

        Raises:
            CorruptData: it has changed.
        """
        path = self._path(number)
        if path is None:
            return self.held[number]
        tensors = files.read_tensors(path, self.files[number])
        return States(tensors["x_hat"].to(device), tensors["final"].to(device))


def open_states(
    config: FitConfig, plan: Plan, model: Any, dictionary: FrozenDictionary, device: torch.device
) -> StoredStates | None:
    """Open what the settings ask to store, filled; return None where they ask for nothing.

    Raises:
        InputError: what was stored is not what the model gives, bit for bit.
        EnvironmentFault, CorruptData: as `StoredStates.fill` and `read`.
    """
    if config.store == "none":
        return None
    described = {
        "model": plan.model_hash, "tokens": plan.token_hash(), "hook_point": dictionary.hook_point,
        "dictionary": dictionary.content_hash(), "keep_ids": plan.keep_ids,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "batch_rows": config.batch_rows,
        "device": device.type,
    }  # fmt: skip
    stored = StoredStates(Path(config.store_folder) if config.store_folder else None, described, dictionary)
    stored.fill(model, plan, config.batch_rows, device)
    first = next(plan.batches(config.batch_rows, device))
    with torch.no_grad(), lora_off(model):
        if not torch.equal(final_states(model, first), stored.read(0, device).final):
            raise InputError(
                f"{stored.folder or 'the store'} holds states that differ in bits from those of {plan.model!r} here, "
                "as another machine or torch makes them. Use another --store-folder."
            )
    return stored
