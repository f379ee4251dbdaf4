"""What others write and read: checkpoints, tokenizers and templates, data files, hub ids, languages."""
