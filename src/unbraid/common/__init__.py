"""What every room uses: the one kind of error that people see, and files that are written whole or not at all."""
