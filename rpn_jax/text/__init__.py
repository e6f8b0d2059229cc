"""Class names to text embeddings: templates and synonyms, CLIP's tokenizer, the text tower."""
