"""Trimming of vocabularies: which tokens stay, the tokenizer that knows them alone, the model with their rows."""
