"""Models without torch: tensors in files."""
