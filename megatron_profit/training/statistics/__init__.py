"""Statistics of tokens that the model in training cannot give: reference, old policy, rankings."""
