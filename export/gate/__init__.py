"""The gate: judge a bundle against its baseline, and fail the build if it is worse. Run by `python -m export.gate`."""
