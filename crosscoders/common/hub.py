"""Repositories of the hub: `upload` puts a folder there, `repository_folder` finds the files of one."""

from pathlib import Path

from crosscoders.common.errors import EnvironmentFault, InputError

PATTERNS = ["*.json", "*.safetensors", "*.pt"]
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN; check the name and the connection."


def upload(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload a folder into a model repository, which is made where it is not there, and return its address.

    Raises:
        InputError: `repo` is no name of a repository.
        EnvironmentFault: the hub refuses, or cannot be reached.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise InputError(f"{repo!r} is no repository of the hub. Give OWNER/NAME.")
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"nothing was pushed to {repo!r}: {_first_line(error)} {LOGIN}") from None
    return address


def repository_folder(path_or_repo: str | Path) -> Path:
    """Return a local path as it is, and of a repository, OWNER/NAME, the folder of its settings and weights.

    Raises:
        InputError: it is neither.
    """
    path, name = Path(path_or_repo), str(path_or_repo)
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"there is no {name!r}. Check the path, or give a hub repository as owner/name.")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name!r} is neither a folder nor a repository that can be read ({_first_line(error)})."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
