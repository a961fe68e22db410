"""From a recipe to a run folder: what is asked for, the loop, and what is written."""
