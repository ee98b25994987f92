"""Estimates of a run before it starts: memory, bytes sent, time, and the layout that follows."""
