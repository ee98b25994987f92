"""Conversations -> token ids and the mask of the supervised tokens, through the chat template."""
