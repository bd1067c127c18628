"""Images on their way to the network: found, split, decoded under guard, augmented, batched.

`digest`, `folders`, `decode` and `preprocess` import no torch, and neither does this package itself.
"""
