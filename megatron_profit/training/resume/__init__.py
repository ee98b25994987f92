"""Resuming: the record of a run, compared with the record in its checkpoint."""
