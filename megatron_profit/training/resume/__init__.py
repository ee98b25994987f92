"""Whether a run may go on from a checkpoint: its record compared with the one of the run that wrote it."""
