"""Head scores from a GGUF file or a Hugging Face checkpoint. Only what reads checkpoints imports torch."""
