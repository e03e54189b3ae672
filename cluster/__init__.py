"""Ray: the coordinator, training workers, export workers."""
