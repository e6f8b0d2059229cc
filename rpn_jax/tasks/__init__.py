"""What the commands do, one file per verb."""
