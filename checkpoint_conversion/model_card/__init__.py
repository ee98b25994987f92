"""The model card of an export: README.md with the facts of its training, and the licence of its base."""
