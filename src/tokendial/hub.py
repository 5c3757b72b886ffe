"""The Hugging Face hub: find files in its local cache, and test whether it can be reached."""

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # a public name

_SECONDS = 5.0


def cached_file(repo: str, *names: str) -> Path | None:
    """Return the first of `names` that the hub's cache has of a repository; None if it has none."""
    repo, _, revision = repo.partition("@")
    for name in names:
        found = try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def hub_problem() -> str | None:
    """Return why the hub cannot be reached, or None if it answers.

    This is quick. The hub's own client would retry each file for half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # its types differ between releases of the client
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{constants.ENDPOINT} does not answer ({reason})"
    return None
