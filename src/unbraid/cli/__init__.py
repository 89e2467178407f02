"""The command line: options and printed output. The work of the verbs is done in other packages."""
