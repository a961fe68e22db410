"""What a run folder has to say: `report.html` and the comparison of runs. Reads the folder alone, never a model."""
