"""Convert checkpoints between HuggingFace and Megatron torch_dist, without a model, a GPU or a process group.

Commands: `python -m checkpoint_conversion.hf_to_megatron`, `… .megatron_to_hf`, `… .verify`. The module
of each command holds a function of the same name, for use from Python.
"""
