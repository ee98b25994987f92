"""Gated DeltaNet: layers with a recurrent state in place of attention, for packed rows at every layout."""
