"""Used by all other packages: the error for users, and reading, hashing and atomic writing of files."""
