"""Several runs over one frozen base."""
