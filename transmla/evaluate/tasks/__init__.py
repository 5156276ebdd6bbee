"""Tasks of lm-eval, opened, answered and scored."""
