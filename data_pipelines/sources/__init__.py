"""The published data sets, one file each, and a folder of your own; what they share beside them."""
