"""Drawing pictures with a base and LoRAs: samplers, guidance, ways to combine LoRAs, editing. Nothing here trains."""
