"""Several studies as one: what they have in common, how much they differ, and with what."""
