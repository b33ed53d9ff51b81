"""What the model says: requests, answers, judges, rates, capability."""
