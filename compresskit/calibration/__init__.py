"""What the targets' inputs look like on real text: one pass through the dense model."""
