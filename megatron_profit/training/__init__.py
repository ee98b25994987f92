"""The SFT entry on Megatron's own training loop, and parts for your own pretrain script."""
