"""From the user's file to clean, split examples; nothing here needs torch."""
