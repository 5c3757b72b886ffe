"""Saved models on the Hugging Face hub: upload a folder, find a folder here or there."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from tokendial.hub import hub_problem


def push_files(
    write: Callable[[Path], None], repo_id: str, *, private: bool | None, token: str | None
) -> str:
    """Upload the files that `write` puts into a folder; returns their address on the hub."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return str(api.upload_folder(repo_id=repo, folder_path=folder))


def local_folder(
    directory: str | Path, names: list[str], *, revision: str | None, token: str | None
) -> Path:
    """The folder `directory`, or a local copy of the hub's repository of that name.

    Args:
        directory: A folder, or "owner/name" of a repository on the hub.
        names: Files to download.
        revision: Branch, tag or commit of the repository; None: its main branch.
        token: Access token of the hub; None: the one that `hf auth login` stored, if any.

    Raises:
        ValueError: If it is neither a folder nor a repository that can be read.
    """
    folder = Path(directory)
    if folder.exists():
        return folder
    name = str(directory)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"no such folder: {folder}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    problem = hub_problem()
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                allow_patterns=names,
                local_files_only=problem is not None,
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = problem or str(error).strip().splitlines()[0]
        at = f" at revision {revision}" if revision else ""
        raise ValueError(f"{name}{at} is neither a folder nor on the hub: {reason}") from None
