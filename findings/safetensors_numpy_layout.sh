#!/usr/bin/env bash
# safetensors.numpy writes an array's memory as it lies: a transposed array comes back with other numbers, and no error.
#
# Versions: safetensors 0.8.0, numpy 2.4.1. Seen: save_file and load_file give back a contiguous array as it was; a
# transposed, a Fortran-ordered and a sliced one come back in the right shape with the numbers in the order of memory.
# We had guessed that an array is copied into row order first, or refused as safetensors.torch refuses a tensor that is
# not contiguous. Policies exported from JAX or Keras are often transposed views: np.ascontiguousarray before saving.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.1
"$folder/venv/bin/python" - "$folder/file" <<'PY'
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

weight = np.arange(12, dtype=np.float32).reshape(3, 4)
square = np.arange(9, dtype=np.float32).reshape(3, 3)
arrays = {
    "contiguous": weight,
    "transposed": weight.T,
    "transposed square": square.T,
    "Fortran order": np.asfortranarray(weight),
    "first columns": weight[:, :2],
}
same = {}
for name, array in arrays.items():
    save_file({"array": array}, sys.argv[1])
    read = load_file(sys.argv[1])["array"]
    assert read.shape == array.shape
    same[name] = bool(np.array_equal(read, array))
print(same)
assert same.pop("contiguous") and not any(same.values()), "safetensors.numpy keeps the numbers now"
PY
