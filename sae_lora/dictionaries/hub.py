"""The name of a published dictionary -> local files, or what SAELens converts.

    <release>/<id>                  a release of SAELens's list, such as gemma-scope-2b-pt-res/layer_12/...
    <owner>/<repository>/<folder>   any repository of the hub with folders that are read here
    <owner>/<repository>            one whose own files are a dictionary

Files are fetched where the layout is one that `loading` reads itself; releases in other layouts (Llama Scope and more)
are left to SAELens (`Converted`). Nothing here is asked for a path that exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, overload

from crosscoders.common.errors import InputError, nearest

_FILES = {"sae_weights.safetensors": "cfg.json", "params.npz": None, "params.safetensors": "config.json",
          "ae.pt": "config.json", "sae.safetensors": "cfg.json"}  # fmt: skip
"""Weights of a folder that `loading` reads, and the settings beside them."""
_MAY_LACK_SETTINGS = ("params.safetensors",)
_READ_HERE = {"gemma_2": "params.npz", "gemma_3": "params.safetensors", "dictionary_learning_1": "ae.pt"}
"""Releases of SAELens's list, by its name of their layout, that are read here from their own files."""


class Converted(NamedTuple):
    """A release that SAELens reads with code of its own."""

    release: str
    sae_id: str
    scale: float | None
    """What SAELens folds into the weights of an SAE that expects scaled activations; None: it knows no factor."""


def fetch(name: str) -> Path | Converted:
    """Return where the files of a published dictionary are, downloaded or in the hub's cache; or say who converts it.

    Raises:
        InputError: it can only be a path, and nothing is there; an unknown release or id; it cannot be fetched.
    """
    release, _, sae_id = name.partition("/")
    if name.startswith((".", "/", "~")) or not sae_id or Path(release).is_dir():
        raise InputError(
            f"there is no dictionary {name!r}. Give a local folder, a params.npz, or RELEASE/ID of the hub, such as "
            "'gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical'."
        )
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    if release not in releases:
        return _folder(name, list(releases))
    known = releases[release]
    if sae_id not in known.saes_map:
        raise InputError(
            f"SAELens's release {release!r} has no id {sae_id!r}{nearest(sae_id, list(known.saes_map))}. It has "
            f"{len(known.saes_map)}, for example {next(iter(known.saes_map))!r}."
        )
    scale = known.norm_scaling_factor.get(sae_id)
    folder = known.saes_map[sae_id]
    if known.conversion_func == "qwen_scope":
        return _file(name, known.repo_id, folder)
    weights = _READ_HERE.get(str(known.conversion_func))
    if known.conversion_func is None and scale is None and set(known.config_overrides or ()) <= {"dataset_path"}:
        weights = "sae_weights.safetensors"
    if weights is not None and not folder.startswith("clt"):
        return _files(name, known.repo_id, folder, weights)
    return Converted(release, sae_id, scale)


def config_of(converted: Converted) -> dict[str, Any]:
    """Return the settings that SAELens gives a published dictionary, without weights.

    Raises:
        InputError: it cannot be fetched.
    """
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    with _one_line("/".join(converted[:2])):
        return load_sae_config_from_huggingface(converted.release, converted.sae_id)


def sae_of(converted: Converted) -> Any:
    """Return the SAE, in float32, its activation scale folded into the weights.

    Raises:
        InputError: it cannot be fetched.
    """
    from sae_lens import SAE

    with _one_line("/".join(converted[:2])):
        return SAE.from_pretrained(converted.release, converted.sae_id)


def _folder(name: str, releases: list[str]) -> Path:
    """Return a folder of a repository that is in no list of SAELens."""
    owner, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    repo_id = f"{owner}/{repository}"
    if folder.endswith(".sae.pt"):
        return _file(name, repo_id, folder)
    if folder.startswith("crosscoder/"):
        import huggingface_hub

        with _one_line(name):
            return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=f"{folder}/*")) / folder
    try:
        for weights in _FILES:
            if (path := _files(name, repo_id, folder, weights, may_lack=True)) is not None:
                return path
    except InputError as error:
        if folder:
            raise
        raise InputError(
            f"there is no dictionary {name!r}: no such path, SAELens knows no release {owner!r}"
            f"{nearest(owner, releases)} As a repository of the hub: {error}"
        ) from None
    raise InputError(
        f"{folder or 'the top'!r} of the hub's repository {repo_id!r} holds none of {', '.join(_FILES)}. Give the "
        "folder of one SAE."
    )


def _file(name: str, repo_id: str, file: str) -> Path:
    import huggingface_hub

    with _one_line(name):
        return Path(huggingface_hub.hf_hub_download(repo_id, file))


@overload
def _files(name: str, repo_id: str, folder: str, weights: str) -> Path: ...
@overload
def _files(name: str, repo_id: str, folder: str, weights: str, *, may_lack: bool) -> Path | None: ...
def _files(name: str, repo_id: str, folder: str, weights: str, *, may_lack: bool = False) -> Path | None:
    """Return the folder that the files were fetched to; None where it may lack these weights, and does."""
    settings, inside = _FILES[weights], f"{folder}/" if folder else ""
    with _one_line(name):
        path = _fetched(repo_id, f"{inside}{weights}", may_lack=may_lack)
        if path is not None and settings is not None:
            _fetched(repo_id, f"{inside}{settings}", may_lack=weights in _MAY_LACK_SETTINGS)
    return path and path.parent


def _fetched(repo_id: str, file: str, *, may_lack: bool) -> Path | None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, file))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) or not may_lack:
            raise
        return None


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"dictionary {name!r} is no local path and cannot be fetched from the hub: {cause} Check the name "
            "and the connection (HF_TOKEN for gated repositories), or download its folder and give the path."
        ) from error
