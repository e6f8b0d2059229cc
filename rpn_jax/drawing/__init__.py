"""What people look at: label maps in color, legends, grids of predictions, plots of a run.

Pixels are drawn with Pillow, where text is measured before it is placed, and plots with
matplotlib's Agg canvas. Both are imported when first used.
"""
