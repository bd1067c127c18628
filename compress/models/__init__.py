"""Networks by name, their weights, and what they cost; `digest` imports no torch, and neither does this package itself."""
