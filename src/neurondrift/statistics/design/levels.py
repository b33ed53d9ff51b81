"""The levels at which something is called evidence. Computes nothing, so that readers of findings can import it."""

from __future__ import annotations

#: A p-value at or below this is called evidence; with K draws it can be reached from K = 19 on.
ALPHA = 0.05
#: What a design finds with this probability counts as what it could have found.
POWER = 0.8
