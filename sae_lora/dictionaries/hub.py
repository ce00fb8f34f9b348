"""The name of a published dictionary -> local files, or what SAELens converts.

    <release>/<id>                  a release of SAELens's list, such as gemma-scope-2b-pt-res/layer_12/...
    <owner>/<repository>/<folder>   any repository of the hub with SAELens or Gemma Scope folders

Files are fetched where the layout is one that `loading` reads itself; releases in other layouts (Llama Scope and more)
are left to SAELens (`Converted`). Nothing here is asked for a path that exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common.errors import InputError, nearest

_SAE_LENS = ("cfg.json", "sae_weights.safetensors")
_GEMMA_SCOPE = ("params.npz",)


class Converted(NamedTuple):
    """A release that SAELens reads with code of its own."""

    release: str
    sae_id: str
    scale: float | None
    """What SAELens folds into the weights of an SAE that expects scaled activations; None: it knows no factor."""


def fetch(name: str) -> Path | Converted:
    """Return the folder of a published dictionary, its files downloaded or in the hub's cache; or say who converts it.

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
    if known.conversion_func == "gemma_2":
        return _files(name, known.repo_id, known.saes_map[sae_id], _GEMMA_SCOPE)
    if known.conversion_func is None and scale is None and set(known.config_overrides or ()) <= {"dataset_path"}:
        return _files(name, known.repo_id, known.saes_map[sae_id], _SAE_LENS)
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
    if not folder:
        raise InputError(
            f"there is no dictionary {name!r}: no such path, and SAELens knows no release {owner!r}"
            f"{nearest(owner, releases)}. Check the name, or give OWNER/REPOSITORY/FOLDER of the hub."
        )
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo_id = f"{owner}/{repository}"
    try:
        return _files(name, repo_id, folder, _SAE_LENS)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            also = f"It has no {_SAE_LENS[0]} with {_SAE_LENS[1]} either. "
            return _files(name, repo_id, folder, _GEMMA_SCOPE, also)
        raise


def _files(name: str, repo_id: str, folder: str, files: tuple[str, ...], also: str = "") -> Path:
    import huggingface_hub

    with _one_line(name):
        paths = [Path(huggingface_hub.hf_hub_download(repo_id, f"{folder}/{file}")) for file in files]
    return paths[0].parent


@contextmanager
def _one_line(name: str, also: str = "") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"dictionary {name!r} is no local path and cannot be fetched from the hub: {cause} {also}Check the name "
            "and the connection (HF_TOKEN for gated repositories), or download its folder and give the path."
        ) from error
