"""What is fast is shown here: one small program a kind of work, see README.md."""
