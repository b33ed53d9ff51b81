"""What is asked of a study beyond its stages."""
