"""From a model, or an exported one, and texts to what the model says of them."""
