"""The LoRA layer and the trainer, on torch alone: adapters, optimisers, steps, many runs at once. Nothing here knows files, methods,
or which base is trained."""
