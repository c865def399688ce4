"""Download a checkpoint from the hub: only what is needed, and a clear word in seconds where there is no network."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from compresskit.errors import InputError, one_line

#: Seconds to wait for the hub before saying that it cannot be reached.
TIMEOUT = 4.0

#: The last one is what sentence-transformers keeps of the modules behind the encoder.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.spm", "[0-9]_*/*")


def download(repo: str) -> Path:
    """The local folder of a hub checkpoint: configuration, tokenizer and one set of weights, safetensors preferred.

    Without a network an earlier download in the cache is used.

    Raises:
        InputError: no such repository, no access, or no network and nothing in the cache.
    """
    try:
        names = _remote_files(repo)
        if names is None:
            return Path(snapshot_download(repo, local_files_only=True))
        safetensors = any(re.fullmatch(r"model.*\.safetensors", name) for name in names)
        weights = "model*.safetensors" if safetensors else "pytorch_model*.bin"
        return Path(snapshot_download(repo, allow_patterns=[*_SMALL_FILES, weights]))
    except LocalEntryNotFoundError:
        raise InputError(
            f"model {repo}: no such folder, and the hub cannot be reached (nor is the model in the local cache); "
            "check the name and the network"
        ) from None
    except (HTTPError, HFValidationError, OSError) as error:
        answer = one_line(error)
        raise InputError(f"model {repo}: no such folder, and the hub answers: {answer}") from None


def load_dataset(repo: str, name: str | None, *, split: str, streaming: bool = False) -> Any:
    """A split of a data set of the hub; from the local cache alone where the hub does not answer in seconds.

    Raises whatever the library raises: a dozen kinds of errors.
    """
    import datasets

    try:
        HfApi().dataset_info(repo, timeout=TIMEOUT)
    except HfHubHTTPError:
        raise  # it was reached, and refuses
    except (HTTPError, OfflineModeIsEnabled, OSError):
        if streaming:
            raise
        with _offline():
            return datasets.load_dataset(repo, name, split=split)
    return datasets.load_dataset(repo, name, split=split, streaming=streaming)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The libraries look into their caches alone; they would ask a silent hub five times, a line and seconds each."""
    import datasets

    libraries: tuple[Any, ...] = (constants, datasets.config)
    before = [library.HF_HUB_OFFLINE for library in libraries]
    for library in libraries:
        library.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for library, switch in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = switch


def _remote_files(repo: str) -> list[str] | None:
    """File names in the repository; None if the hub cannot be reached."""
    try:
        return [file.rfilename for file in HfApi().model_info(repo, timeout=TIMEOUT).siblings or []]
    except HfHubHTTPError:
        raise  # it was reached, and refuses
    except (HTTPError, OfflineModeIsEnabled, OSError):
        return None
