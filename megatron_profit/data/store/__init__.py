"""Tokenized examples on disk: made once by several processes, verified, and mapped by all ranks."""
