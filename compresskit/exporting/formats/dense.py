"""An ordinary checkpoint with every factor multiplied out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from compresskit.exporting.format import FORMATS, ExportFormat, NoOptions, Written, left_out

if TYPE_CHECKING:
    from compresskit.model.checkpoint import Checkpoint
    from compresskit.tasks.predicting import Runnable


@FORMATS.register
class Dense(ExportFormat[NoOptions]):
    """In the stored dtype. Benchmarks have no rows for it: it is as large and as fast as the dense model."""

    name = "dense"
    summary = "an ordinary checkpoint, every factor multiplied out"

    def write(self, read: Checkpoint, folder: Path, options: NoOptions) -> Written:
        from compresskit.model import sentence
        from compresskit.model.sharing import separate

        dense = copy.deepcopy(read.model).dequantize()
        separate(dense)
        dense.save_pretrained(folder)
        if read.folder is not None and dense.base_model is dense:
            sentence.copy(read.folder, folder)
        # Factors of parts that this class does not use cannot be multiplied out without their layers.
        return Written(notes=left_out(read))

    def load(self, folder: Path) -> Runnable:
        from compresskit.model import checkpoint

        return checkpoint.read(folder).model.float().eval()

    def weight_files(self, folder: Path) -> list[Path]:
        from compresskit.model import checkpoint

        return checkpoint.weight_files(folder)
