"""Pipelines of diffusers: what is trained of them, and the files in which their adapters travel."""
