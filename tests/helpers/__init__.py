"""What several test modules make for themselves: models, adapters, groups, oracles, studies. Not one test."""
