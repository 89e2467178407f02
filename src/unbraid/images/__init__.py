"""Pictures and captions from the user's files: opening, cropping, folders of pictures; and contact sheets. Nothing here depends on LoRAs
or models."""
