"""Trainings of one base with several settings, evaluated on the same tasks."""
