"""Classify texts on a small device. Needs onnxruntime, tokenizers and numpy; neither torch nor compresskit.

    compresskit export final/ --format onnx-int8 --output device/       # on your own machine
    python classify_onnx.py device/ "a lovely film" "a waste of time"   # on the device

`final/` is a compressed sequence classifier, as `compresskit distill --task` makes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Classifier:
    """An exported sequence classifier.

    Args:
        folder: what ``compresskit export`` wrote.
        threads: CPU threads.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.labels = [config["id2label"][str(number)] for number in range(len(config["id2label"]))]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(config["max_position_embeddings"] - 2)
        self.tokenizer.enable_padding(pad_id=config.get("pad_token_id") or 0)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        self.inputs = [value.name for value in self.session.get_inputs()]

    def __call__(self, texts: list[str]) -> list[tuple[str, float]]:
        """The most likely label of each text, with its probability."""
        encoded = self.tokenizer.encode_batch(texts)
        columns = {
            "input_ids": [text.ids for text in encoded],
            "attention_mask": [text.attention_mask for text in encoded],
            "token_type_ids": [text.type_ids for text in encoded],
        }
        (logits,) = self.session.run(["logits"], {name: np.array(columns[name]) for name in self.inputs})
        if logits.ndim != 2:
            raise SystemExit("this folder holds no classifier of texts: `compresskit predict --model FOLDER` runs it")
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares = exponentials / exponentials.sum(axis=-1, keepdims=True)
        return [(self.labels[row.argmax()], float(row.max())) for row in shares]


if __name__ == "__main__":
    folder, *texts = sys.argv[1:]
    for text, (label, share) in zip(texts, Classifier(Path(folder))(texts), strict=True):
        print(f"{label}\t{share:.3f}\t{text}")
