"""What became of broken grids, in one line that can be quoted."""

from collections.abc import Mapping


def verdict(total: Mapping[str, int]) -> str:
    """What happened in all parts, in one line."""
    jobs, again, other = (total.get(name, 0) for name in ("jobs", "ended twice", "other"))
    kills = total.get("workers killed", 0) + total.get("killed", 0)
    return (
        f"verdict: {'broken' if again or other else 'kept'}. {jobs - again} of {jobs} jobs done exactly once, "
        f"{jobs - other} of {jobs} LoRAs equal bit for bit; {kills} kills of workers, "
        f"{total.get('drivers killed', 0)} of drivers, disk full {total.get('disks full', 0)} times"
    )
