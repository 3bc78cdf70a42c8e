"""A decoder language model around any attention variant, native to Hugging Face transformers."""
