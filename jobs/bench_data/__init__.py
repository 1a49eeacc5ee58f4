"""`flamingo data bench`: our reader beside other loaders, on the same shards and cores, in one run."""
