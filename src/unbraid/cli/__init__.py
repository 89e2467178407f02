"""The command line: options and what is printed. What the verbs do stands elsewhere."""
