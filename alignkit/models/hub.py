"""Find adapters on the Hugging Face Hub, and put exports there."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants as hub
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from alignkit.errors import AlignkitError
from alignkit.lora.peft_files import CONFIG_FILE, WEIGHTS_FILE
from alignkit.models.load import hub_reachable
from alignkit.models.text_format import FORMAT_FILE


def adapter_on_hub(name: str, argument: str) -> Path:
    """Return the local directory of a Hub adapter's files, which are downloaded where needed.

    Args:
        name: The repository's id, such as ``org/adapter``.
        argument: Names the setting, for messages.

    Raises:
        AlignkitError: There is no such repository or no adapter in it, or the Hub is unreachable.
    """
    reachable = hub_reachable()
    try:
        directory = snapshot_download(
            name,
            allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, FORMAT_FILE],
            cache_dir=hub.HF_HUB_CACHE,
            local_files_only=not reachable,
        )
    except HFValidationError:
        raise AlignkitError(f"{argument} '{name}': no such file or directory") from None
    except LocalEntryNotFoundError:
        raise AlignkitError(
            f"{argument} '{name}': no such file or directory, and the Hugging Face Hub cannot be "
            "reached; pass a .ckpt file or an adapter's directory"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:; ")
        raise AlignkitError(f"{argument} '{name}': {reason}; pass a file or a Hub id") from None
    if not (Path(directory) / CONFIG_FILE).is_file():
        raise AlignkitError(
            f"{argument} '{name}': the Hub's repository holds no {CONFIG_FILE}; to start from a "
            "whole model pass it as model.base"
        )
    return Path(directory)


def check_push(repo: str) -> None:
    """Refuse a repository that nothing could be pushed to, before any work is done.

    Raises:
        AlignkitError: The id is malformed, the Hub is switched off, or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise AlignkitError(f"push {repo!r}: {str(error).splitlines()[0]}") from None
    if hub.HF_HUB_OFFLINE:
        raise AlignkitError(f"push {repo}: HF_HUB_OFFLINE is set; unset it, or leave push out")
    if huggingface_hub.get_token() is None:
        raise AlignkitError(f"push {repo}: nobody is logged in; run hf auth login, or set HF_TOKEN")


def push(directory: Path, repo: str) -> str:
    """Put a directory's files into a repository of the Hub, which is made private if it is new.

    Returns:
        The address of what was written.

    Raises:
        AlignkitError: The Hub refuses or cannot be reached. The directory stays as it is.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        written = api.upload_folder(
            repo_id=repo, folder_path=directory, commit_message="Export of alignkit"
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:; ")
        raise AlignkitError(
            f"push {repo}: {reason}; the export lies in {directory}, and hf upload {repo} "
            f"{directory} puts it there"
        ) from None
    return str(written)
