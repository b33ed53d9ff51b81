"""What the fine-tuning change does: measured for each training seed, and compared group by group."""
