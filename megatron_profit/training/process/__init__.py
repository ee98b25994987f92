"""The processes of a run: first rank, console, signals and their end."""
