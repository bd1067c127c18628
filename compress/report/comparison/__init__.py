"""Compare runs and bundles."""
