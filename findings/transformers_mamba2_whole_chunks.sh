#!/usr/bin/env bash
# transformers' Mamba-2 without CUDA kernels fills every sequence up to whole chunks of 256: 2 steps cost what 256 do.
#
# Version: transformers 5.24.0, torch 2.13.0 (CPU build), one thread; a layer of width 64, batch of 4. The largest tensor
# of a forward pass has 1,048,576 elements for 2, 64 and 256 steps and twice as many for 257; times were 26, 28, 28, 51 ms
# for 2, 64, 256, 257. FLOPs of matrix products fall only from 165 to 110 million. The outputs are right.
# We had guessed that a scan's cost goes with the length, so that windows of 100 steps may be compared with another
# implementation at the configuration's defaults. Of the 256 steps that 100 become 61% are padding: set chunk_size to the
# length.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy==2.2.6
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import time

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mamba2Config, Mamba2Model


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def largest(model, steps):
    inputs = {"inputs_embeds": torch.zeros(4, steps, 64), "use_cache": False}
    with torch.no_grad():
        model(**inputs)
        began = time.process_time()
        model(**inputs)
        seconds = time.process_time() - began
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        with Largest() as mode:
            model(**inputs)
    flops = counter.get_total_flops()
    print(f"{steps} steps: largest tensor {mode.elements:,}, {flops / 1e6:.0f} MFLOP, {1000 * seconds:.0f} ms")
    return mode.elements


sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1}
usual = Mamba2Model(Mamba2Config(**sizes, vocab_size=8)).eval()
print("transformers", transformers.__version__, "torch", torch.__version__, "chunk_size", usual.config.chunk_size)
found = {steps: largest(usual, steps) for steps in (2, 64, 256, 257)}
assert found[2] == found[64] == found[256] == found[257] / 2, "the cost goes with the length now"
print("chunk_size 2:")
short = Mamba2Model(Mamba2Config(**sizes, vocab_size=8, chunk_size=2)).eval()
assert largest(short, 2) < found[2] / 10, "a smaller chunk helps no more"
PY
