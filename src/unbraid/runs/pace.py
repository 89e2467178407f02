"""How often a run saves, and the sampling steps of its pictures. The self-test and tests lower these temporarily."""

SAVE_EVERY = 20.0  # seconds between saves: about the most work that is lost if the run is killed
PREVIEW_STEPS, SHEET_STEPS = 12, 25
