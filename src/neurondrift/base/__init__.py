"""What stands on nothing: no torch, no model, nothing of a study. Errors, files, progress, memory, processes."""
