"""A reference becomes a model, its sites, its data and its change."""
