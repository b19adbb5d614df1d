"""Models and what is added to them: prompts, adapters, soft prompts, checkpoints."""
