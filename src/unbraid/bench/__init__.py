"""The benchmark: every method on tasks with right answers. `truth`: tasks, real art and scores; `rows`: the methods; `reports`: tables
and plots; `field`: the same rows on a user's own pictures, with the scores that papers use."""
