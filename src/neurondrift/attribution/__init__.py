"""What a change of weights does: to the refusal margin, to outputs on given inputs, and whose update it resembles."""
