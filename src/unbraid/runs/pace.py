"""How often a run saves, and how many sampling steps its pictures take. The self-test and tests lower these for a while."""

SAVE_EVERY = 20.0  # seconds of work that a kill may cost
PREVIEW_STEPS, SHEET_STEPS = 12, 25
