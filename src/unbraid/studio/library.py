"""What the library shows of LoRA files: a card per file, and what the user's tool would do with it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from unbraid.common.errors import UsageError, printable
from unbraid.files.doctor import Diagnosis, diagnoses
from unbraid.files.formats.header import catalogue, read_header
from unbraid.files.formats.tool_rules import TOOLS
from unbraid.files.tools import Done
from unbraid.studio.safety import Home

MOST = 60  # cards on the page
THUMBNAIL = re.compile(r"data:image/(jpeg|png|webp);base64,[A-Za-z0-9+/=]{1,400000}")
TRIGGERS = ("unbraid.prompt", "modelspec.trigger_phrase", "ss_output_name")  # the metadata key that is found first


@dataclass(frozen=True)
class Card:
    """A LoRA file in short. `problem`: why it cannot be read, or ""."""

    name: str
    size: int = 0
    family: str = ""
    modules: int = 0
    trigger: str = ""
    thumbnail: str = ""
    problem: str = ""


def cards(home: Home) -> list[Card]:
    """The newest LoRAs of the studio's folder."""
    return [card(name, path) for name, path in list(home.lora_files().items())[:MOST]]


def card(name: str, path: Path) -> Card:
    """What a file's header says. Metadata is the file's own: nothing of it is trusted."""
    try:
        size, header = path.stat().st_size, read_header(path)
        found = catalogue(header)
    except (UsageError, OSError) as error:
        return Card(name, problem=printable(error.what if isinstance(error, UsageError) else error))
    trigger = next((header.metadata[key] for key in TRIGGERS if header.metadata.get(key)), "")
    picture = header.metadata.get("modelspec.thumbnail", "")
    thumbnail = picture if THUMBNAIL.fullmatch(picture) else ""
    return Card(name, size, found.verdict.family, len(found.modules), printable(trigger), thumbnail)


def html(found: Sequence[Card]) -> str:
    """The cards as HTML."""
    if not found:
        return "<p>No LoRA yet. Make one on the page <i>Split</i>, or upload one.</p>"
    return f"<div class='cards'>{''.join(map(_html, found))}</div>"


def _html(one: Card) -> str:
    picture = f"<img src='{one.thumbnail}' alt=''>" if one.thumbnail else "<div class='blank' aria-hidden='true'></div>"
    base = "a base that is not known" if one.family == "unknown" else one.family
    facts = escape(one.problem or f"{base} · {one.modules} modules · {one.size / 2**20:.1f} MiB")
    trigger = f"<p>“{escape(one.trigger)}”</p>" if one.trigger else ""
    return f"<div class='card'>{picture}<div><b>{escape(one.name)}</b>{trigger}<p class='axis'>{facts}</p></div></div>"


def examined(path: Path, tool: str) -> str:
    """What a tool, or every tool for an empty name, would do with a file, as Markdown. UsageError for unknown tools."""
    found = diagnoses(path, [tool] if tool else TOOLS)
    lines = [line for one in found for line in _examined(one)]
    mend = any(one.mend for one in found)
    return "\n".join([*lines, *(["", "*Convert* mends it."] if mend else [])])


def _examined(one: Diagnosis) -> list[str]:
    verdict = f"refuses it: {one.refused}" if one.refused else f"loads {one.loads} of {one.modules} modules"
    if not one.known:
        verdict = f"nothing is known of what it does with such files ({one.family})"
    reasons = Counter(re.sub(r": \S+…$", "", why[:300]) for why in one.dropped.values())
    more = [f"warning: {printable(warning, 200)}" for warning in one.warnings]
    more += [f"drops {count} keys: {printable(why)}" for why, count in reasons.items()]
    sign = "✓" if one.healthy else "!"
    return [f"- {sign} **{one.tool}**: {_plain(verdict)}", *(f"    - {_plain(line)}" for line in more)]


def _plain(text: str) -> str:
    """A text from a file in Markdown, in which nothing of it is a sign."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&$])", r"\\\1", printable(text, 300))


def written(done: Done) -> str:
    """What was written, in a sentence."""
    low, high = done.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    kept = f", kept {done.kept[0]:.1%} of the energy" if done.kept != (1.0, 1.0) else ""
    return f"**{done.path.name}**: {done.modules} modules, {ranks}{kept}. It is in the library."
