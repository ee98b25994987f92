"""The flags of a run: read, compared with the model, completed and refused before Megatron starts."""
