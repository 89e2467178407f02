"""`python -m unbraid` is the command line."""

from unbraid.cli.main import main

main()
