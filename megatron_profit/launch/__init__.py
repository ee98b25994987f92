"""`megatron-profit sft --model ID --data FILE`: what follows from the two is derived, printed and started.

The command is a front. It derives the ordinary flags of `megatron_profit.sft`, prints them as one command,
and starts exactly this command with torchrun. It imports neither torch nor transformers before it has looked
at everything that can be wrong without them.
"""
