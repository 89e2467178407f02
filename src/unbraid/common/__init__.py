"""Used by all other packages: the error for users, and atomic writing of files."""
