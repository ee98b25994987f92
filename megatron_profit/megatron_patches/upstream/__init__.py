"""The upstream functions that the patches change, and the digests by which they are known."""
