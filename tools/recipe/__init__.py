"""How the embedded base `icons` is made: art, captions, tokenizer, VAE, UNet, judge, card.

Run `python -m tools.recipe --help`. Every stage resumes where it was killed.
"""
