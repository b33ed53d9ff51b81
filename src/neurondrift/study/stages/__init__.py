"""What each stage of a study does, one module a stage: a function that does it, and one that names its files."""
