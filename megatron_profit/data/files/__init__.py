"""Files of chat records: finding them, and reading their records one by one and within limits."""
