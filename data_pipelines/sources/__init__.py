"""The published data sets and the forms of your own data, one file each; what they share."""
