"""Networks by name, their weights and their costs. `digest` and `known` import no torch, and neither does this file."""
