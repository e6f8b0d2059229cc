"""Inference: from images and words to labels and scores."""
