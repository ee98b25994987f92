"""The checkpoints of a run: finding a whole one, saving, keeping, loading and exporting."""
