"""The gate: a bundle against its baseline, and a verdict that fails a build. `python -m export.gate` runs it."""
