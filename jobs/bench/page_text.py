"""Texts of docs/benchmarks.md that no measurement changes."""

HOW = """
## How to run

```
make bench                                    # flamingo bench kernels: everything, into runs/bench (hours on a GPU)
flamingo bench kernels --budget-seconds 240   # the most important shapes first, the rest left
flamingo bench kernels --ops gated_xattn --levels core --shapes 9B
flamingo bench step --networks 9b 80b-tp8     # the step level alone, other sizes
flamingo bench step --networks 3b --pixels --profile   # where the time goes, vision encoder included
flamingo bench step --networks 3b-idefics --rows 4 --length 2048 --media 32   # long contexts
flamingo bench losses                         # a short fp32 training run against the same run on the CPU
python -m jobs.bench.tune                     # other tiles than the kernels' tables hold, by time
flamingo bench page benchmarks/results/*.json --page docs/benchmarks.md
make gpu-check                                # kernel tests, losses, steps of 3B, kernels, in under nine minutes
```

`python -m jobs.bench` is the same command where only torch, triton and the standard library are installed; layer,
step and losses also need megatron-core (its wheel with einops and PyYAML is enough), the picture matplotlib. Without
a GPU `flamingo bench kernels` says so and prints the roofline; `--device cpu --tiny` sends tiny shapes through the
whole path, from the checks to a page, to test the benchmark itself. Results are `kernels.csv` and `kernels.json`
(GPU, torch, triton and commit in every line; CUDA, Python in the JSON), `kernels.png` and this page.

`flamingo bench step --profile` runs torch's profiler over three warm steps of each of our contenders and writes
`profile.csv` and `profile.md` (time by part of the network, forward, backward and recomputation apart, and the 25 most
expensive operators) and a Chrome trace each. The parts are ranges in the training code
(`flamingo_dist.models.ranges`), which Nsight Systems shows too under `torch.autograd.profiler.emit_nvtx`; without a
profiler they cost 0.1 us. `--pixels` sends images through NFNet-F6 instead of starting from features; `--compiled` adds
our step with the frozen blocks under torch.compile (`parallel.compile_frozen`); `--fuse-encoder`.
"""

MEASURED = """
## What is measured

- **No speed without right numbers.** Before it is timed, every contender's outputs and all its gradients are
  compared, on memory poisoned with NaN, with an fp64 computation of another kind (`jobs/bench/cases.py`):
  ||difference|| / ||reference|| at most 2e-2 in bf16, 4e-2 for layers. A gradient that is one sum of many terms of
  either sign (the gate's) is measured against the terms' norm. Who is wrong is refused. With `--tests FILE` (JUnit of
  the kernels' tests on this GPU) a kernel with a red test, or with none that passed, is refused too; `make gpu-check`
  always passes it.
- **Time**: CUDA events around the call, the L2 cache overwritten before each one, after three warm-ups; calls under
  2 ms also as a CUDA graph, and the faster of the two counts, for baselines and ours alike. Median, 20% and 80%
  quantiles. "Tie" says that these ranges overlap.
- **GB/s** is the least number of bytes (each input read once, each output written once) by the time; its share is of
  a 1 GiB copy in the same run. The attention cores are bound by memory (28 to 63 FLOP a byte against a ridge near
  270), so TFLOP/s say little.
- **Modes**: fwd builds the graph for a backward; bwd runs that graph again; fwd+bwd is both, with peak and saved
  memory beyond the inputs. All inputs want gradients.
- **Levels**: core is the operation alone on ready queries, keys and values; layer is the model's own GATED
  XATTN-DENSE block or Resampler layer with all weight gradients; step is a network of 3B's widths (or 9B's, or
  one of eight tensor-parallel slices of 80B's) with few blocks, optimizer included, beside the same weights in
  transformers' Idefics classes where those can be the network (names in -idefics).
- **Sweep**: images 1, 2, 5, 8, 16, 32; rows 256, 512, 2048; heads 128 and 64 wide; spans even, skewed, with text
  before the first image, and without any image; batches of 16,384 rows and of one sample; features 100 to 6,750 for
  the Resampler.
"""

BASELINES = """
## Baselines

| name | what it is | what is counted |
| --- | --- | --- |
| B0 eager | OpenFlamingo's code pass by pass | its mask, made in the call as there |
| B1 eager additive | IDEFICS' additive mask, softmax in fp32, rows without an image cleared after | not the mask |
| B2 compiled B0 | torch.compile of B0 | as B0 |
| B3 SDPA mask | torch's fused attention under a dense bool mask; the note names the backend it chose | not the mask |
| B4 Flex 64, 128 | compiled FlexAttention, mask blocks of 64 or 128 | "mask built": the block mask too; else not |
| B5 varlen FA2 | `varlen_attn` (FlashAttention-2) on one segment an image | packing where some rows see no image |
| B5 ..., empty segments | the same, rows without an image as segments without keys: nothing is packed | |
| B6 padded SDPA | a batch row an image, padded to the longest span | gather and scatter, unless spans are equal |

Every one multiplies by the gate; ours also finds its spans inside. Inputs are batch-first and contiguous at core
level, which suits the baselines; the layer has the model's own sequence-first layout. A mask or an index that depends
on the batch alone is made before the clock starts, as if every layer shared it. For the Resampler: eager and SDPA
after concatenation, and compiled; for the element-wise functions: eager and compiled.
"""

EXPECTATION = """
## What to expect, by arithmetic

None of this is measured. Forward plus backward moves at least 3.4 GB at the 80B training shape, 1.1 ms at 3.0 TB/s.

- **N = 1 or 2 images, rows 256: we tie or lose.** A dense kernel then computes one or two times the scores that are
  needed, and stays bound by memory, as ours is; without rows that see nothing, padded SDPA and varlen need no
  packing, and their forward is at the same floor. What is left is the gate (one pass over the output that ours saves)
  and the backward (6 bytes an element of Q against about 22 for FlashAttention-2's separate delta, fp32 accumulator
  and conversion).
- **Tiny batches: we tie or lose.** One sample of 256 rows is microseconds of work on any side; launches decide. Ours
  launches two kernels forward (spans, attention), which a graph hides and eager Python does not.
- **5 images at rows 256: little in the forward.** Dense computes 5 times the scores, 172 GFLOP at 80B; at 350 TFLOP/s
  that is 0.49 ms against a floor of 0.40 ms: 1.2 times at most over a good dense kernel. The backward has to bring
  the rest.
- **32 images at rows 2048:** dense is bound by compute, 3.1 ms against 0.36 ms forward at 80B.
- **Whole layers move less.** The FFW is three quarters of the products at 80B: 1.1 times for the layer at the
  training shape, 1.4 times in long contexts, more at 3B.
- **add_layernorm and gated_relu2:** torch.compile reaches the same number of passes; a tie is the expectation.
- **OpenFlamingo's own shape** (8 heads of 64) has a floor of 0.025 ms: launches decide.
"""

NO_FIGURES = """
## Figures

None yet. `make gpu-check` on a machine with a GPU writes them; copy its `kernels.json` and `step.json` to
`benchmarks/results/` and write this page anew with `flamingo bench page`.
"""

ROOFLINE = """
## Roofline

Arithmetic from shapes alone (`jobs/bench/roofline.py`), no measurement: bf16, one layer, one device, each input read
once and each output written once; ceilings of an H100 taken as 800 TFLOP/s and 3.0 TB/s. Tensor parallelism divides
every row by its degree.
"""
