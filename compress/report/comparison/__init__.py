"""Runs and bundles side by side."""
