"""Low-level work on bytes: files, dtypes, values, threads, checksums, and folders that appear whole."""
