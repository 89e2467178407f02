"""The LoRA layer and the trainer: adapters, optimisers, training steps, and batched runs of several jobs. This package
builds on torch, without diffusers. It does not depend on files, on methods, or on which base model is trained."""
