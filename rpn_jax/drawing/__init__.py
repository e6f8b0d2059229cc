"""Figures and images for people."""
