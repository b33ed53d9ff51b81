"""Arrays in, named results out: do the members of a group drift more than comparable ones? Not one sentence."""
