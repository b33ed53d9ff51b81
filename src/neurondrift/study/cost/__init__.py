"""What a study will cost on this machine: how much is to be computed, and how fast that is done here."""
