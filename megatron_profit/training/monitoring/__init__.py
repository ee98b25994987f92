"""What a run says: metrics, guards, curves and token reports."""
