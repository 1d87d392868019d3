"""Send a saved model to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .errors import UserError

# What any failure of the connection is derived from; which library it comes from depends on huggingface_hub's version.
CONNECTION_ERRORS = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def push_folder(
    folder: str | Path, repo_id: str, *, api: Any = None, private: bool = False, revision: str | None = None
) -> str:
    """Upload every file of a folder as one commit; the repository is made when there is none.

    Args:
        folder: with a config.json and a README.md.
        repo_id: "owner/name".
        api: an `HfApi`; one with the token of `hf auth login` or HF_TOKEN when absent.
        private: of a repository that is made now; one that exists stays what it is.
        revision: branch, made when there is none; the main branch when absent.
    Returns:
        The address of the repository.
    Raises:
        UserError: no model or card in the folder, no token, no connection, or the hub refuses.
    """
    folder = Path(folder)
    for name in ("config.json", "README.md"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}, so it is no exported model; write it with regiontower export.")
    kept = f"the model is kept in {folder}; `hf upload {repo_id} {folder}` sends it later"
    if api is None:
        if is_offline_mode():
            raise UserError(f"nothing was sent to the hub, because HF_HUB_OFFLINE is set; {kept}.")
        if get_token() is None:
            raise UserError(f"there is no token for the hub: run `hf auth login` or set HF_TOKEN; {kept}.")
        api = HfApi()
    try:
        address = str(api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True))
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Written by regiontower export"
        )
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no name for a repository (owner/name): {_line(error)}; {kept}.") from error
    except HfHubHTTPError as error:
        raise UserError(f"the hub refused {repo_id!r} ({_line(error)}): check the token's rights; {kept}.") from error
    except CONNECTION_ERRORS as error:
        raise UserError(f"the upload failed ({_line(error)}): check the connection to the hub; {kept}.") from error
    return address


def _line(error: Exception) -> str:
    """The first line of a message, without the full stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
