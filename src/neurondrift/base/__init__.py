"""What stands on nothing: no torch, no model, nothing of a study. Errors, files, locks, names, progress, processes, roles, the terminal."""
