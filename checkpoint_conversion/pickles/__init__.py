"""Pickles and archives of torch, read without running any code of them."""
