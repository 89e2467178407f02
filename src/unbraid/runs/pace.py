"""How often a run saves, how often a grid looks and tries again, and the sampling steps of pictures. The self-test and tests lower these temporarily."""

SAVE_EVERY = 20.0  # seconds between saves: about the most work that is lost if the run is killed
PREVIEW_STEPS, SHEET_STEPS = 12, 25
LOOK_AGAIN = 3.0  # seconds until a worker looks again at jobs that other workers have
TRY_AGAIN = 10.0  # seconds until a job whose disk was full is tried again on a cluster
