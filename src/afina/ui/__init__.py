"""A page in the browser: training started, watched and stopped; base and adapter compared."""
