"""The one error of a deployed model's files."""


class BundleError(ValueError):
    """Report a model or bundle that cannot be used as it is; the message names the thing, its value and the repair."""
