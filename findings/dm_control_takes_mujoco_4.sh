#!/usr/bin/env bash
# `pip install dm_control` gives a suite of which no task loads: it accepts MuJoCo 4, and cannot read its models.
#
# Versions: dm_control 1.0.50, the newest, with mujoco 4.0.0, which pip chooses for its `mujoco>=3.17.0`. Seen: pip
# check finds nothing wrong, `from dm_control import suite` works, and suite.load fails for every benchmark task with
# "AttributeError: 'MjModel' object has no attribute 'flex_vertedge'". With mujoco 3.17.0 all of them load.
# We had guessed that a package by MuJoCo's own authors bounds its version, or works with the newest. Whoever
# requires dm_control has to require mujoco<4 too.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/look.py" <<'PY'
import collections

from dm_control import suite

found = collections.Counter()
for domain, task in suite.BENCHMARKING:
    try:
        suite.load(domain, task).reset()
        found["loads"] += 1
    except AttributeError as error:
        found[str(error).partition(". ")[0]] += 1
print(dict(found))
PY
count() { MUJOCO_GL=disable "$folder/venv/bin/python" "$folder/look.py" 2> /dev/null; }
"$folder/venv/bin/pip" install -q dm_control==1.0.50 mujoco==4.0.0
"$folder/venv/bin/pip" check > /dev/null
newest=$(count)
"$folder/venv/bin/pip" install -q mujoco==3.17.0
older=$(count)
printf 'mujoco 4.0.0: %s\nmujoco 3.17.0: %s\n' "$newest" "$older"
[[ $newest == *flex_vertedge* && $newest != *loads* ]] || { echo "mujoco 4.0.0 works now"; exit 1; }
[[ $older == *loads* && $older != *attribute* ]] || { echo "mujoco 3.17.0 fails now"; exit 1; }
