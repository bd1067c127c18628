"""Readers of foreign files under random input: what may happen is a BundleError, nothing else."""
