"""The section on a model with a known answer."""
