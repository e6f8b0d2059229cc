"""RPN: open-vocabulary semantic segmentation by relationship prompts."""
