"""Models with a known answer: how they are made, and how they are read."""
