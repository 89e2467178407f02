"""Claims of papers, tested: each says that one row is better than another in a task."""

from collections.abc import Iterable
from dataclasses import dataclass

from unbraid.bench.reports.stats import METRICS, Lead, holm, lead
from unbraid.bench.results import Unit


@dataclass(frozen=True)
class Claim:
    """A claim that `row` is better than `other` in `metric`."""

    task: str
    row: str
    other: str
    metric: str
    source: str


OWN_PROMPTS = "ablation: UnZipLoRA, own prompts"  # the paper's way to draw; our row leaves out layers
CLAIMS = (
    Claim("separate", "UnZipLoRA", "DreamBooth-LoRA", "likeness", "arXiv 2412.04465"),
    Claim("separate", "UnZipLoRA", "B-LoRA", "likeness", "arXiv 2412.04465"),
    Claim("separate", "UnZipLoRA", "UnZipLoRA, official", "likeness", "this project's corrections"),
    Claim("separate", "UnZipLoRA", "UnZipLoRA, official, loss scale 300", "likeness", "this project's corrections"),
    Claim(
        "separate",
        "UnZipLoRA",
        "UnZipLoRA, official, loss scale 300, our ratio",
        "likeness",
        "this project's corrections",
    ),
    Claim("separate", "B-LoRA", "DreamBooth-LoRA", "leak", "arXiv 2403.14572"),
    Claim("recombine", OWN_PROMPTS, "DreamBooth-LoRAs", "likeness", "arXiv 2412.04465"),
    Claim("recombine", OWN_PROMPTS, "B-LoRA", "likeness", "arXiv 2412.04465"),
    Claim("recombine", "UnZipLoRA, zipped", OWN_PROMPTS, "likeness", "arXiv 2311.13600"),
    Claim("recombine", "UnZipLoRA", OWN_PROMPTS, "likeness", "this project's layers by role"),
    Claim("recombine", "UnZipLoRA", OWN_PROMPTS, "leak", "this project's layers by role"),
    Claim("recombine", "ConsisLoRA", "B-LoRA", "leak", "arXiv 2503.10614"),
    Claim("combine", "layers by role", "direct sum", "likeness", "this project's layers by role"),
    Claim("combine", "ZipLoRA", "direct sum", "likeness", "arXiv 2311.13600"),
    Claim("combine", "ZipLoRA", "joint training", "likeness", "arXiv 2311.13600"),
    Claim("combine", "ZipLoRA", "ZipLoRA, public recipe", "likeness", "this project's corrections"),
    Claim("combine", "ZipRank", "ZipLoRA", "likeness", "DuoLoRA, ICCV 2025"),
    Claim("combine", "K-LoRA", "ZipLoRA", "likeness", "arXiv 2502.18461"),
    Claim("combine", "K-LoRA, released rule", "ZipLoRA", "likeness", "arXiv 2502.18461"),
    Claim("combine", "EST-LoRA", "K-LoRA, released rule", "likeness", "arXiv 2508.02165"),
    Claim("combine", "ZipRank, layer prior", "ZipRank", "likeness", "DuoLoRA, ICCV 2025"),
    Claim("combine", "NP-LoRA", "direct sum", "likeness", "arXiv 2511.11051"),
    Claim("combine", "LoRA Switch", "direct sum", "likeness", "arXiv 2402.16843"),
    Claim("combine", "LoRA Composite", "direct sum", "likeness", "arXiv 2402.16843"),
    Claim("combine", "KnOTS", "TIES", "likeness", "arXiv 2410.19735"),
    Claim("combine", "Break-for-Make, fine-tuned", "ZipLoRA", "likeness", "doi 10.1145/3728461"),
    Claim("combine", "Break-for-Make, fine-tuned", "joint training", "likeness", "doi 10.1145/3728461"),
    Claim("transfer", "Pair", "DreamBooth-LoRA of the picture after", "likeness", "arXiv 2405.01536"),
    Claim("transfer", "Pair", "Concept Slider", "likeness", "arXiv 2405.01536"),
    Claim("transfer", "Pair", "Pair at LoRA scale", "structure", "arXiv 2405.01536"),
)


@dataclass(frozen=True)
class Verdict:
    """A claim, the measured difference, and the conclusion."""

    claim: Claim
    lead: Lead
    word: str  # `holds`, `reversed` or `undecided`


def verdicts(units: Iterable[Unit]) -> list[Verdict]:
    """A verdict on every claim whose rows have results. A claim holds or is reversed if the difference has p < 0.05 after Holm's correction
    over all claims; otherwise it is undecided."""
    some = list(units)
    pairs = [(one, lead(some, one.task, one.row, one.other, one.metric)) for one in CLAIMS]
    tested = [(claim, found) for claim, found in pairs if found]
    corrected = holm([found for _, found in tested])
    return [Verdict(claim, found, _word(claim, found)) for (claim, _), found in zip(tested, corrected, strict=True)]


def _word(claim: Claim, found: Lead) -> str:
    if found.p >= 0.05:
        return "undecided"
    return "holds" if (found.ahead.mean > 0) == METRICS[claim.metric][1] else "reversed"
