"""What a person sees: tables on the terminal, the record and the model card beside the weights."""
