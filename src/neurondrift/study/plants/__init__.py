"""Models with a known answer: how they are made, and which scores find it."""
