"""One training step: the batch, the objective as a Megatron loss, and its sums and counts."""
