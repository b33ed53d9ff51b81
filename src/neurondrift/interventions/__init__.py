"""Acting on a group and giving everything back; alone and beside matched random groups."""
