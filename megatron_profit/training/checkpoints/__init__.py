"""The folder of a run: which checkpoint is whole, what is saved, kept, loaded and exported."""
