"""Memory, FLOPs, traffic and time of a run, predicted from its configuration alone."""
