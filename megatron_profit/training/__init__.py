"""The SFT entry on Megatron's own training loop, and the parts for a pretrain script of one's own."""
