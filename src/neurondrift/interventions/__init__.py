"""Acting on a group: prune, rewind, transplant, freeze; alone (`effects`) and beside matched random groups (`null`)."""

from neurondrift.interventions.effects import Applied, prune, rewind, save_model, transplant

__all__ = ["Applied", "prune", "rewind", "save_model", "transplant"]
