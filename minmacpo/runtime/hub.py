"""Finds models of Hugging Face's hub that are on this machine already; nothing is downloaded."""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # org/name


def local_folder(path: Path | str) -> Path:
    """The path, or the snapshot in the hub's cache where it is the name of a model (org/name).

    The cache is read by the package huggingface_hub, which is optional: without it, or without a
    snapshot, the path comes back as it is.
    """
    path = Path(path)
    if path.exists() or not HUB_NAME.fullmatch(str(path)):
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return path
    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return path
