"""Files of chat records: which there are, and their records, one by one and within limits."""
