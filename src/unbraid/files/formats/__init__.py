"""LoRA formats: names in all dialects, block tables, headers, metadata, and the rules by which tools read keys."""
