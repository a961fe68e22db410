"""How several processes share the work of a run: one interface, one file an engine."""
