"""Fine-tuning and distillation on transformers' Trainer."""
