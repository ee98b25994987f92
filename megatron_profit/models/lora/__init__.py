"""Low-rank adapters on Megatron's linear layers, at any layout, named as HuggingFace and PEFT name them."""
