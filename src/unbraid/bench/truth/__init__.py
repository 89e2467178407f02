"""The right answers: real art, the judge and the scores that compare drawings with it, and the tasks."""
