"""``shrink``: from a checkpoint to a distilled student in one go, as a list of single commands."""
