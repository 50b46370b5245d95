"""Head scores from a Hugging Face checkpoint. The only place that imports torch and transformers."""
