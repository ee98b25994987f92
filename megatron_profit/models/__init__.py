"""Models: what Megatron-Core builds from a HuggingFace folder."""
