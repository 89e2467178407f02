"""LoRA formats as data and names: dialects, block tables, headers, loaders' key rules. files.py reads and writes with it."""
