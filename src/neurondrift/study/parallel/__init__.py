"""Training in one or several processes: whose rows are whose, and how gradients add up."""
