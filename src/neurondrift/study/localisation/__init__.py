"""Which scores find what was planted, and what acting on what they find does."""
