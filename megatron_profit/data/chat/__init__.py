"""Raw records in the common chat formats -> conversations."""
