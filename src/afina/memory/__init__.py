"""What a run needs of a machine's memory: said before, measured, kept small."""
