"""HuggingFace <-> Megatron torch_dist checkpoints, without a model, a GPU or a process group."""
