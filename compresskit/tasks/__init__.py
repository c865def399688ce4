"""Tasks: what is read, what labels mean, how answers are scored."""
