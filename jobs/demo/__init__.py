"""The demonstration's real parts: fetched through package managers, then written as shards."""
