"""The output of a run: metrics, guards, curves and token reports."""
