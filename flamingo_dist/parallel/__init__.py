"""Topology, Megatron groups and ZeRO: everything that knows how many processes there are."""
