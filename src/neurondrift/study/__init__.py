"""The study: settings, folder, stages in order, findings."""
