"""Data: shards on any file system -> samples -> tokens -> batches. No torch, nothing of the other rooms."""
