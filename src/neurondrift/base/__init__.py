"""What stands on nothing: no torch, no model, nothing of a study; errors, files, names, locks, processes, roles."""
