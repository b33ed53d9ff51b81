"""What decoding is made of: the cache, the draws, and transformers' own loop."""
