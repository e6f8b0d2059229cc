"""A file for every verb of the commands."""
