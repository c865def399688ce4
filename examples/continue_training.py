"""Fine-tune a compressed model further with transformers' own Trainer, on a file of texts and labels.

    python continue_training.py small/ reviews.tsv better/      # reviews.tsv: columns text and label

The result is a compressed folder of the same size, ready for ``compresskit export``.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import compresskit  # noqa: F401 - lets transformers read the factorised layers


def train(folder: str, file: str, output: str, epochs: float = 3.0, learning_rate: float = 1e-3) -> float:
    """Train the model in ``folder`` on ``file``, save it in ``output``; returns the last loss."""
    rows = load_dataset("csv", data_files=file, delimiter="\t", split="train").class_encode_column("label")
    names = rows.features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    limit = model.config.max_position_embeddings - 2
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=limit), remove_columns=["text"])
    settings = TrainingArguments(
        output_dir=f"{output}-checkpoints",
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)
    return float(trainer.state.log_history[-1]["train_loss"])


if __name__ == "__main__":
    print(f"training loss {train(*sys.argv[1:4]):.3f}")
