"""Drawing pictures with a base and LoRAs: samplers, guidance, ways of combining LoRAs, editing. Nothing here trains."""
