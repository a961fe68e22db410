"""The HTTP server: tuned models answer in OpenAI's form, rows of different adapters in one batch."""
