"""Functions of Megatron's optimizers that the patches replace."""
