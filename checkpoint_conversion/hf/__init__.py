"""HuggingFace model folders: read, planned and written."""
