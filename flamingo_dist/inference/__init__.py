"""Generation: few-shot prompts, greedy and sampled decoding, beam search."""
