"""alignkit: align causal language models in three stages, LoRA, SFT and DPO."""
