"""The commands that ask a study, or a model, more than its stages: groups, interventions, ranks, known answers."""
