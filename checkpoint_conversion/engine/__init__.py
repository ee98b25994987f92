"""Bytes: files, dtypes, values, threads, checksums and folders that appear whole."""
