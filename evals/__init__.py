"""The machinery below eval.py: multiple choice, reply language, answers, judging, tables and plots."""
