"""Low-rank adapters (LoRA) of a model: their names, PEFT folders, and the merge into the weights."""
