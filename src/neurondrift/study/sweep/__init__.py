"""Many studies at once: a grid or a list of overrides over one configuration, shared stages done once, one answer."""
