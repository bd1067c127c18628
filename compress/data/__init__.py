"""Images on their way to the network: found, split, decoded, augmented, batched.

`digest`, `shards`, `shard_files`, `split` and `teachers` import no torch, and neither does this file.
"""
