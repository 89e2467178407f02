"""`python -m unbraid` is the command line."""

from unbraid.cli import main

main()
