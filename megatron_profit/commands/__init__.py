"""The commands that users type, installed with the package: `megatron-profit COMMAND …`."""
