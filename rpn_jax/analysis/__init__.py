"""Finished runs compared, and networks looked into."""
