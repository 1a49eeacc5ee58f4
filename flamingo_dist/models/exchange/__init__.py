"""Networks in and out: our own folder of safetensors, Hugging Face's IDEFICS, OpenFlamingo's checkpoints."""
