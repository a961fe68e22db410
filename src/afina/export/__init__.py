"""From a run folder to what other programs read; what answers otherwise than the run is not written."""
