"""The translator by hand: network, beam search, tokenizer."""
