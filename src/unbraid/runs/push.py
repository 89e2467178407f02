"""Publishing a run on the Hugging Face hub: a folder with the LoRAs, a model card and pictures, and its upload."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from unbraid.common.errors import UsageError, first_line
from unbraid.runs.model_card import Said, model_card
from unbraid.runs.published import HUB_ID, Published, published

CARD = "README.md"
REFUSED = {  # HTTP status → what is wrong, and how to fix it
    400: ("the hub refuses the model card", "Mend what it names, or give --license an id that the hub knows."),
    401: ("the hub does not know your token", "Log in again: hf auth login."),
    403: ("your token may not write there", "Take a name of your own, and a token with the right to write."),
    404: ("your token may not write there", "Take a name of your own, and a token with the right to write."),
}


def push(
    run: str | Path,
    name: str,
    *,
    dry_run: str | Path | None = None,
    pictures: str | Path | None = None,
    license: str = "",
    base_model: str = "",
    private: bool = False,
) -> str:
    """Publish a finished run as `name`, OWNER/NAME, on the Hugging Face hub. Returns its address.

    With `dry_run`, a new folder, nothing is uploaded: the folder holds what would be, and its path is returned. `pictures`: a
    folder with pictures that `generate` drew with the LoRAs, beside those in the run folder. `license` and `base_model`: hub
    ids that replace the base's own. UsageError if the run is not finished, or if the hub refuses."""
    said, found = _checked(name, license, base_model), published(Path(run), Path(pictures) if pictures else None)
    if dry_run:
        return str(write(found, said, Path(dry_run)))
    if not get_token():
        raise UsageError("there is no token for the Hugging Face hub", name, "Log in: hf auth login; or set HF_TOKEN.")
    with TemporaryDirectory() as place, _hub_errors(name):
        folder = write(found, said, Path(place) / "repository")
        return upload(folder, name, private)


def _checked(name: str, license: str, base_model: str) -> Said:
    for one, option in ((name, "HUB/NAME"), (base_model, "--base-model")):
        try:
            if one or option == "HUB/NAME":
                validate_repo_id(one)
            if one and not HUB_ID.fullmatch(one):
                raise HFValidationError("there is no owner in it")
        except HFValidationError as error:
            what = f"{one!r} is not a name on the hub: {first_line(error, 60)}"
            raise UsageError(what, option, "Give OWNER/NAME, such as ada/octopus.") from error
    return Said(name, license, base_model)


def write(run: Published, said: Said, out: Path) -> Path:
    """Write the folder that is uploaded: README.md, the LoRA files, and the pictures. UsageError if it is in use already."""
    names = {path: f"image_{i}{path.suffix}" for i, path in enumerate(run.pictures)}
    card = model_card(run, said, {name: run.pictures[path] for path, name in names.items()})
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError("is in use already", out, "Give a new folder.")
        out.mkdir(parents=True, exist_ok=True)
        for file in run.triggers:
            shutil.copyfile(file, out / file.name)
        for path, name in names.items():
            shutil.copyfile(path, out / name)
        card.save(out / CARD)
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror})", out, "Choose another folder or make room.") from error
    return out


def upload(folder: Path, name: str, private: bool = False) -> str:
    """Upload a folder, and return its address. The hub checks the card before anything is made there."""
    ModelCard.load(folder / CARD).validate()
    api = HfApi()
    address = api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload with unbraid")
    return str(address)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Raise what the hub and its library say as UsageError."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        what, fix = REFUSED.get(status, (f"the hub answers with {status}: {first_line(error, 60)}", "Try again later."))
        raise UsageError(what, name, fix) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        fix = "Check the network and HF_HUB_OFFLINE; --dry-run needs neither."
        raise UsageError("the hub cannot be reached", name, fix) from error
    except ValueError as error:  # a card that the hub refuses, with the hub's reason
        what, fix = REFUSED[400]
        raise UsageError(f"{what}: {first_line(error, 80)}", name, fix) from error
    except RuntimeError as error:  # of the library that stores large files
        raise UsageError(f"the upload failed: {first_line(error, 80)}", name, "Try again.") from error
