"""Pictures and captions as people have them: opening, cropping, folders of pictures, and sheets that show results. Nothing here knows
LoRAs or models."""
