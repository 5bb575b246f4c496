"""Questions about documents: reading files, prompts, a model from its options, a conversation with it."""
