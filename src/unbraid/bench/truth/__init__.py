"""The right answers: real art, the judge that measures pictures against it, and the tasks."""
