"""A chaos suite: runs are killed, disks are full, settings and files are hostile, and every promise is checked.

`python -m tools.chaos --minutes 10 --seed 1` draws cases at random; `--only kills --cases 100` draws a number of one kind."""
