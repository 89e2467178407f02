"""unbraid: take an image apart into a content LoRA and a style LoRA, and put LoRAs together again."""
