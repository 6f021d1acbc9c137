"""Find adapters on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants as hub
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

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
