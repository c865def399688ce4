"""compresskit: make BERT-style checkpoints 5, 10, 20 times smaller, and know what it costs.

``import compresskit`` is light (no torch) and lets transformers load compressed folders:

    import compresskit
    from transformers import AutoModel
    model = AutoModel.from_pretrained("all-MiniLM-L6-v2-kronecker-19x")
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compresskit.answering.answers import predict
    from compresskit.answering.evaluating import evaluate
    from compresskit.api import compress, load, plan, to_dense
    from compresskit.benchmark.runner import bench
    from compresskit.errors import CompresskitError, InputError, WorkError
    from compresskit.exporting.exported import export
    from compresskit.folders.publish import push
    from compresskit.folders.verification import verify
    from compresskit.planning.stage import Stage
    from compresskit.shrinking.run import shrink
    from compresskit.training.stages import distill, finetune
    from compresskit.training.trainer import DistillationTrainer
    from compresskit.vocabulary.trimming import trim

__version__ = "0.2.0"

_PUBLIC = {
    "compress": "compresskit.api",
    "load": "compresskit.api",
    "plan": "compresskit.api",
    "to_dense": "compresskit.api",
    "shrink": "compresskit.shrinking.run",
    "bench": "compresskit.benchmark.runner",
    "export": "compresskit.exporting.exported",
    "predict": "compresskit.answering.answers",
    "push": "compresskit.folders.publish",
    "distill": "compresskit.training.stages",
    "evaluate": "compresskit.answering.evaluating",
    "finetune": "compresskit.training.stages",
    "DistillationTrainer": "compresskit.training.trainer",
    "Stage": "compresskit.planning.stage",
    "trim": "compresskit.vocabulary.trimming",
    "verify": "compresskit.folders.verification",
    "CompresskitError": "compresskit.errors",
    "InputError": "compresskit.errors",
    "WorkError": "compresskit.errors",
}

__all__ = [
    "CompresskitError",
    "DistillationTrainer",
    "InputError",
    "Stage",
    "WorkError",
    "__version__",
    "bench",
    "compress",
    "distill",
    "evaluate",
    "export",
    "finetune",
    "load",
    "plan",
    "predict",
    "push",
    "shrink",
    "to_dense",
    "trim",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'compresskit' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_with_transformers() -> None:
    """Once transformers has the module to register with."""
    from wrapt import when_imported  # takes six times as long to load as all else here

    when_imported("transformers.quantizers.auto")(lambda _module: import_module("compresskit.model.quantizer"))


class _BeforeTransformers:
    """Among the finders of modules: finds none, but sees when transformers is about to be imported."""

    @staticmethod
    def find_spec(name: str, _path: Any = None, _target: Any = None) -> None:
        if name == "transformers":
            _register_with_transformers()


if "transformers" in sys.modules:
    _register_with_transformers()
else:
    sys.meta_path.insert(0, _BeforeTransformers)
