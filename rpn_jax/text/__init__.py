"""Class names to unit vectors: templates, CLIP's tokenizer, embeddings."""
