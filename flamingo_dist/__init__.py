"""Training of Flamingo visual language models: network, parallelism, training loop, inference, evaluation."""

import warnings

# megatron-core says at import, once a module, which CUDA extensions it would like; the plain parts are meant here.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated")
