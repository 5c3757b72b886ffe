"""The Hugging Face hub: what its cache holds, and whether it answers at all, asked once."""

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # a public name

_SECONDS = 5.0


def cached_file(repo: str, *names: str) -> Path | None:
    """The first of some files of a repository that is in the hub's cache; None: none is."""
    repo, _, revision = repo.partition("@")
    for name in names:
        found = try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def hub_problem() -> str | None:
    """Why the hub does not answer; None: it does.

    Its own client tries each file several times over, for half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # the client's own, which differ from release to release
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{constants.ENDPOINT} does not answer ({reason})"
    return None
