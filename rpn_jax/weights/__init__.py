"""Weight files of CLIP, of prompts and of the authors, in and out."""
