"""What a skeptic compares with: one file per baseline, each one registered class."""
