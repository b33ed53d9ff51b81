"""Text on its way to a model: how files of examples are read, and what their columns mean."""
