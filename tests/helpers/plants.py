"""A plant that is made in seconds."""

#: Settings of a plant in a tiny model.
TINY_PLANT = {
    "share": 0.1,
    "answers": False,
    "steps": 16,
    "check_every": 16,
    "rate": 0.01,
    "settle_steps": 1,
    "scoring": 8,
    "prompts": 4,
    "answer_tokens": 8,
}
